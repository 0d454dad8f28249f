r"""Rebuilds base/ and data/, a tiny model and its problems, of recipes/tiny, its studies, or recipes/calibrated.

    python scripts/make_tiny_base.py
    python scripts/make_tiny_base.py --min_digits 7 --max_digits 9 --output recipes/tiny/study
    python scripts/make_tiny_base.py --data_only --train_rows 530 --min_digits 3 --max_digits 12 \
        --output recipes/tiny/skip
    python scripts/make_tiny_base.py --task calibrated

The base is a Qwen2 of two layers that has read a teacher's answers to the task of recipes/tiny/running_sums.py or
recipes/calibrated/task.py. It first learns from clean single chains how to add, and last from a mixture of answers
with slips, guessed, walked once or checked. So it can do all that reinforcement learning has to bring out, but
does the right thing only sometimes. The seed is fixed and one thread computes: a second run on the same machine with
the same package versions writes the same bytes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from fipo_trl.evaluation.exam import Exam, Sample
from fipo_trl.evaluation.sampling import transformers_sampler


sys.path.insert(0, str(Path(__file__).parents[1]))  # the task lies beside its recipes
from recipes.calibrated import task as calibrated
from recipes.tiny import running_sums
from recipes.tiny.running_sums import correct_answer, exact_answer, make_problem


PAD, EOS = "<pad>", "<eos>"
TEST_ROWS = 200


class Phase(NamedTuple):
    """A lesson.

    Attributes:
        steps: Of the optimizer.
        digits: Smallest and largest number of digits of its problems.
        slip: The teacher's slip rate.
        shares: {max_walks: share of the answers}.
        batch_size: Answers per step.
        learning_rate: At its peak.
    """

    name: str
    steps: int
    digits: tuple[int, int]
    slip: float
    shares: dict[int, float]
    batch_size: int = 64
    learning_rate: float = 4e-3


class Base(NamedTuple):
    """A base model.

    Attributes:
        alphabet: Every character of its prompts and answers.
        max_tokens: Of a prompt and its answer.
        teacher: `(rng, prompt, max_walks, slip) -> answer`.
        kinds: Of answers, shortest first.
        kind_of_answer: Puts an answer in one of them.
        digits: Smallest and largest number of digits of the problems it is asked.
    """

    alphabet: str
    max_tokens: int
    teacher: Callable[[Random, str, int, float], str]
    kinds: tuple[str, ...]
    kind_of_answer: Callable[[str], str]
    digits: tuple[int, int]
    phases: tuple[Phase, ...]


def tiny(min_digits: int, max_digits: int) -> Base:
    """The base of recipes/tiny, for problems of so many digits."""
    of = running_sums
    phases = (
        Phase("clean chains", 400, (1, max_digits), 0.0, {1: 1.0}),  # short problems teach adding in half the steps
        Phase("checks", 450, (1, max_digits), 0.18, {3: 1.0}),
        Phase("mixture", 350, (min_digits, max_digits), 0.18, {0: 0.40, 1: 0.35, 2: 0.12, 3: 0.13}),
    )
    # The teacher's longest answer has 109 tokens with its prompt, with 9 digits 160
    return Base(of.ALPHABET, 256, of.worked_answer, of.KINDS, of.kind_of_answer, (min_digits, max_digits), phases)


def of_calibrated_study() -> Base:
    """The base of recipes/calibrated."""
    of, digits = calibrated, (15, 17)
    phases = (
        Phase("clean chains", 300, (1, 8), 0.0, {1: 1.0}),
        Phase("checks", 400, (1, 8), 0.18, {4: 1.0}),
        Phase("longer checks", 300, (1, digits[1]), 0.09, {4: 1.0}, 32, 3e-3),
        Phase("mixture", 400, digits, 0.09, {1: 0.50, 3: 0.32, 4: 0.18}, 32, 3e-3),
        Phase("more slips", 150, digits, 0.25, {1: 0.50, 3: 0.32, 4: 0.18}, 32, 3e-3),
    )
    # The teacher's longest answer has 382 tokens with its prompt
    return Base(of.ALPHABET, 400, of.worked_answer, of.KINDS, of.kind_of_answer, digits, phases)


def write_data(rng: Random, folder: Path, min_digits: int, max_digits: int, train_rows: int = 2000) -> list[str]:
    """Writes train.jsonl and test.jsonl, with no prompt twice, and returns the prompts of the latter."""
    problems: dict[str, None] = {}  # a set that keeps its order
    while len(problems) < TEST_ROWS + train_rows:
        problems[make_problem(rng, min_digits, max_digits)] = None
    test, train = list(problems)[:TEST_ROWS], list(problems)[TEST_ROWS:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("train", train), ("test", test)):
        rows = [json.dumps({"prompt": prompt, "solution": correct_answer(prompt)}) + "\n" for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return test


def make_tokenizer(alphabet: str, max_tokens: int) -> Qwen2Tokenizer:
    """Returns a tokenizer with one token per character of the alphabet, padding on the left.

    It is a Qwen2Tokenizer without merges, because `AutoTokenizer` turns the tokenizer of every Qwen2 model into
    one; another tokenizer would lose its spaces when it is loaded.
    """
    characters = [character.replace(" ", "Ġ") for character in alphabet]  # how byte-level vocabularies write a space
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *characters])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=PAD,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Returns an untrained Qwen2 of two layers and width 96, about 150,000 weights in float32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=3,  # of size 32, the smallest that vLLM has on the CPU
        num_key_value_heads=3,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def train(model, tokenizer, rng: Random, held_out: set[str], phase: Phase, teacher: Callable) -> None:
    """Trains one phase on completion tokens only, on no held-out prompt; the learning rate warms up, then decays."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 40, (phase.steps - step) / (0.4 * phase.steps))
    )
    started = time.perf_counter()
    for step in range(1, phase.steps + 1):
        prompts, answers = [], []
        while len(prompts) < phase.batch_size:
            prompt = make_problem(rng, *phase.digits)
            if prompt in held_out:
                continue
            max_walks = rng.choices(list(phase.shares), list(phase.shares.values()))[0]
            prompts.append(prompt)
            answers.append(teacher(rng, prompt, max_walks, phase.slip))
        input_ids, labels = encode(tokenizer, prompts, answers)
        logits = model(input_ids=input_ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.perf_counter() - started
            print(f"{phase.name}: step {step}/{phase.steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


def encode(tokenizer, prompts: list[str], answers: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids padded on the right and labels that are -100 on prompts and padding, both of shape (B, L)."""
    ids = [
        [*tokenizer.encode(prompt + answer), tokenizer.eos_token_id]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    input_ids = torch.full((len(ids), max(map(len, ids))), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True)):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, len(prompt) : len(tokens)] = torch.tensor(tokens[len(prompt) :])
    return input_ids, labels


def sample(model, tokenizer, problems: list[str], n: int) -> list[list[Sample]]:
    """Samples n answers to each problem at temperature 1 from the whole distribution, as long as the context is."""
    prompt_ids = tokenizer(problems)["input_ids"]
    exam = Exam({"prompt": problems}, prompt_ids, exact_answer, tokenizer, [tokenizer.eos_token_id])
    max_tokens = model.config.max_position_embeddings - max(map(len, prompt_ids))
    sampler = transformers_sampler(model.eval(), exam.end_ids, temperature=1.0, top_p=1.0, max_tokens=max_tokens)
    batches = exam.answers(sampler, n, batch_size=n * len(problems), seed=0)
    return [samples for batch in batches for samples in batch.values()]


def report(samples: list[list[Sample]], base: Base) -> None:
    """Prints sampled accuracy, mean length in tokens and the share of each kind of answer."""
    answers = [sample for row in samples for sample in row]
    rows = {"all answers": answers} | {name: [] for name in base.kinds}
    for sample in answers:
        rows[base.kind_of_answer(sample["completion"])].append(sample)
    print(f"\n{'':16}{'share':>8}{'accuracy':>10}{'tokens':>8}")
    for name, members in rows.items():
        count = max(len(members), 1)
        accuracy = sum(sample["correct"] for sample in members) / count
        tokens = sum(sample["length"] for sample in members) / count
        print(f"{name:16}{len(members) / len(answers):8.1%}{accuracy:10.3f}{tokens:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("tiny", "calibrated"), default="tiny", help="(tiny)")
    parser.add_argument("--output", type=Path, help="folder for base/ and data/ (recipes/TASK)")
    parser.add_argument("--data_only", action="store_true", help="make no base/")
    parser.add_argument("--train_rows", type=int, default=2000, help="problems of data/train.jsonl (2000)")
    parser.add_argument("--min_digits", type=int, help="of a problem of the tiny task (4; its study's: 7)")
    parser.add_argument("--max_digits", type=int, help="of a problem of the tiny task (6; its study's: 9)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the problems and the samples")
    args = parser.parse_args()
    if args.task == "tiny":
        base = tiny(args.min_digits or 4, args.max_digits or 6)
    elif args.min_digits or args.max_digits:
        sys.exit("error: --min_digits and --max_digits are of the tiny task: remove them.")
    else:
        base = of_calibrated_study()
    output = args.output or Path("recipes") / args.task

    torch.set_num_threads(1)  # the order of additions, and so the bytes, must not depend on the number of cores
    torch.manual_seed(args.seed)
    rng = Random(args.seed)
    test = write_data(rng, output / "data", *base.digits, args.train_rows)
    if args.data_only:
        return
    tokenizer = make_tokenizer(base.alphabet, base.max_tokens)
    model = make_model(tokenizer)
    for phase in base.phases:
        train(model, tokenizer, rng, set(test), phase, base.teacher)
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    report(sample(model, tokenizer, test, n=8), base)


if __name__ == "__main__":
    main()
