"""Answers that are sampled in batches are those that are sampled one at a time, whatever was answered before."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fipo_trl.evaluation.exam import Exam, metrics_of
from fipo_trl.evaluation.sampling import default_batch_size, transformers_sampler
from recipes.tiny.running_sums import exact_answer, predicted_answer


TINY = Path(__file__).parents[2] / "recipes/tiny"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY / "base").eval()


@pytest.fixture(scope="module")
def exam():
    """Seven problems of 9, 11 and 13 tokens."""
    columns = load_dataset("json", data_files=str(TINY / "data/test.jsonl"), split="train[:7]").to_dict()
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    prompt_ids = tokenizer(columns["prompt"])["input_ids"]
    assert len({*map(len, prompt_ids)}) == 3
    return Exam(columns, prompt_ids, exact_answer, tokenizer, [tokenizer.eos_token_id])


def all_answers(exam, sampler, n, batch_size, seed=0, done=()):
    answers = {}
    for samples in exam.answers(sampler, n, batch_size, seed, done):
        assert not answers.keys() & samples.keys()
        answers |= samples
    return answers


def test_padding_does_not_matter(model, exam):
    """With nothing but the likeliest token to sample from, an answer is the same beside others as alone."""
    sampler = transformers_sampler(model, exam.end_ids, temperature=1.0, top_p=1e-6, max_tokens=60)
    together = sampler(exam.prompt_ids, [0] * 7)
    for prompt, answer in zip(exam.prompt_ids, together, strict=True):
        assert sampler([prompt], [0]) == [answer]
        output = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=60)
        assert output[0, len(prompt) :].tolist() == answer
    assert len({*map(len, together)}) > 2
    assert {answer[-1] for answer in together if len(answer) < 60} == {*exam.end_ids}


TRANSFORMER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


MODELS = pytest.mark.parametrize(
    ("make", "gives_state"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**TRANSFORMER, sliding_window=6)), True),
        (lambda: Lfm2ForCausalLM(Lfm2Config(**TRANSFORMER, layer_types=["conv", "full_attention"])), True),
        # It does not give its state away
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=8)),
            False,
        ),
    ],
    ids=["sliding window", "convolutions and attention", "state space"],
)


def make_random(make):
    """With weights large enough that answers differ, in float64 so that rounding decides nothing."""
    torch.manual_seed(0)
    model = make().double().eval()
    for weights in model.parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=0.3)
    return model


def likeliest(model, prompts, end_ids, max_tokens):
    """Answers of a batch, and the shapes (rows, tokens) that the model has read."""
    passes = []

    def watch(model, args, kwargs):
        passes.append(tuple(kwargs["input_ids"].shape))

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    answers = transformers_sampler(model, end_ids, 1.0, 1e-6, max_tokens)(prompts, [0] * len(prompts))
    hook.remove()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(input_ids=ids, do_sample=False, max_new_tokens=max_tokens, eos_token_id=end_ids)
        assert output[0, len(prompt) :].tolist() == answer
    return answers, passes


@MODELS
def test_answers_that_have_ended_leave_the_batch(make, gives_state):
    """Whatever the model keeps of the tokens it has read, the other answers go on as they would alone."""
    model = make_random(make)
    prompts = [torch.randint(2, 40, (length,)).tolist() for length in (3, 9, 5, 7, 12, 4, 6, 8) * 3]
    max_tokens = 40
    together, passes = likeliest(model, prompts, [1, 5], max_tokens)
    lengths = sorted(map(len, together))
    assert lengths[6] < lengths[12] < max_tokens
    # Of the rows computed for each token, more than three in four belong to answers that go on
    assert len(passes) == lengths[-1]
    for token, (rows, _) in enumerate(passes):
        assert sum(length > token for length in lengths) > 0.75 * rows
    assert passes[0] == (24, 12)
    assert all(columns == 1 for _, columns in passes[1:]) == gives_state


@MODELS
def test_prompts_that_share_all_but_the_last_token_are_read_once(make, gives_state):
    model = make_random(make)
    short, long = (torch.randint(2, 40, (length,)).tolist() for length in (4, 9))
    prompts = [[*short, 7], [*long, 8], [*short, 9], [*short, 7], [*short, 10], [*long, 8]]
    answers, passes = likeliest(model, prompts, [1, 5], max_tokens=20)
    assert passes[:2] == [(2, 9), (6, 1 if gives_state else 10)]
    assert len({tuple(answer) for answer in answers}) == 4
    # Nothing to share: no two are alike, or one has nothing before its last token
    assert likeliest(model, prompts[:2], [1, 5], max_tokens=20)[1][0] == (2, 10)
    assert likeliest(model, [[7], *prompts], [1, 5], max_tokens=20)[1][0] == (7, 10)
    assert likeliest(model, [[7]] * 3, [1, 5], max_tokens=20)[1][0] == (3, 1)


def test_answers_have_limits_of_their_own(model, exam):
    sampler = transformers_sampler(model, exam.end_ids, temperature=1.0, top_p=1e-6, max_tokens=60)
    limits = [1, 60, 3, 2, 7, 30, 4]
    answers = sampler(exam.prompt_ids, [0] * 7)
    assert sampler(exam.prompt_ids, [0] * 7, limits) == [ids[:n] for ids, n in zip(answers, limits, strict=True)]
    assert sampler(exam.prompt_ids, [0] * 7) == answers


def test_samples_follow_the_models_distribution(model, exam):
    """The first tokens after the shortest prompt, beside the longest, come as often as the model says."""
    shortest, longest = min(exam.prompt_ids, key=len), max(exam.prompt_ids, key=len)
    n = 4000
    for temperature, top_p in ((1.0, 1.0), (1.5, 0.9)):
        sampler = transformers_sampler(model, exam.end_ids, temperature, top_p, max_tokens=1)
        firsts = torch.tensor(sampler([shortest] * n + [longest], range(n + 1))[:n])[:, 0]
        chances = (model(input_ids=torch.tensor([shortest])).logits[0, -1] / temperature).softmax(-1)
        ordered, tokens = chances.sort(descending=True)
        chances[tokens[ordered.cumsum(0) - ordered >= top_p]] = 0  # the likeliest tokens that reach top_p stay
        chances /= chances.sum()
        shares = torch.bincount(firsts, minlength=len(chances)) / n
        assert (shares - chances).abs().le(5 * (chances * (1 - chances) / n).sqrt() + 1e-6).all()
        assert chances.max() < 0.9


@pytest.mark.parametrize(("n", "batch_size", "sizes"), [(2, 6, [6, 6, 2]), (2, 100, [14]), (5, 3, [3, 2] * 7)])
def test_what_is_done_already_changes_nothing(model, exam, n, batch_size, sizes):
    sampler = transformers_sampler(model, exam.end_ids, temperature=1.0, top_p=1.0, max_tokens=30)
    seen = []

    def watched(prompts, seeds):
        seen.append(len(prompts))
        assert len({*seeds}) == len(seeds)
        return sampler(prompts, seeds)

    whole = all_answers(exam, watched, n, batch_size)
    assert seen == sizes
    assert list(whole) == list(range(7))
    assert {len(samples) for samples in whole.values()} == {n}
    assert len({sample["completion"] for samples in whole.values() for sample in samples}) > 7
    torch.manual_seed(12345)
    for done in ({0, 1, 2, 4}, {6}):
        rest = all_answers(exam, sampler, n, batch_size, done=done)
        assert rest == {problem: samples for problem, samples in whole.items() if problem not in done}
    assert all_answers(exam, sampler, n, batch_size, seed=1) != whole
    assert all_answers(exam, sampler, n, batch_size, done=range(7)) == {}


def test_samples_and_metrics(model, exam):
    sampler = transformers_sampler(model, exam.end_ids, temperature=1.0, top_p=1.0, max_tokens=12)
    answers = all_answers(exam, sampler, n=8, batch_size=64)
    for problem, samples in answers.items():
        prompt = exam.columns["prompt"][problem]
        for sample in samples:
            assert sample["correct"] == bool(exact_answer([prompt], [sample["completion"]])[0])
            assert sample["answer"] == predicted_answer(sample["completion"])
            assert sample["length"] == len(sample["completion"]) + (not sample["truncated"])
            assert sample["length"] == 12 or not sample["truncated"]
    flat = [sample for samples in answers.values() for sample in samples]
    assert {sample["truncated"] for sample in flat} == {True, False}
    metrics = metrics_of(list(answers.values()), exam.has_answers)
    assert metrics["avg@8"].mean() == sum(sample["correct"] for sample in flat) / len(flat)
    assert {"cons@8", "pass@8"} <= metrics.keys()
    assert "cons@8" not in metrics_of(list(answers.values()), has_answers=False)


def test_default_batch_sizes_bound_the_memory():
    assert default_batch_size("transformers", context=141) == 256
    assert default_batch_size("transformers", context=4096) == 128
    assert default_batch_size("transformers", context=20480 + 300) == 25
    assert default_batch_size("transformers", context=10**6) == 1
    assert default_batch_size("vllm", context=20480 + 300) == 256


def test_out_of_memory_names_the_setting(exam):
    model = AutoModelForCausalLM.from_pretrained(TINY / "base").eval()
    hook = model.register_forward_pre_hook(lambda *_: torch.empty(2**60, dtype=torch.uint8))
    sampler = transformers_sampler(model, exam.end_ids, temperature=1.0, top_p=1.0, max_tokens=20)
    with pytest.raises(ValueError, match=r"Out of memory: 2 answers of up to 20 tokens.*batch_size of less than 2"):
        sampler(exam.prompt_ids[:2], [0, 1])
    hook.remove()
    model.register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))  # another error is not taken for it
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        sampler(exam.prompt_ids[:2], [0, 1])
