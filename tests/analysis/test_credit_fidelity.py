"""True credit, of a policy whose values can be calculated: a Markov chain, as a Qwen2 that sees its last token only.

After the prompt it writes a or b, each with chances that depend on the letter before, until it ends. An answer is
right if its last letter is an a.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from scipy.stats import spearmanr
from tiny import BASE
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from fipo_trl.analysis.credit_fidelity import (
    SIGNALS,
    WHOLE,
    Ranks,
    ceiling,
    cell,
    correlation,
    correlations,
    parts_of,
    rank_correlation,
)
from fipo_trl.analysis.true_credit import HALF_LIVES, Answer, nucleus
from fipo_trl.commands.credit_fidelity import main
from fipo_trl.recipe.build import build
from fipo_trl.recipe.validate import read_and_validate
from fipo_trl.trainer.token_credit import write_trace


LIMIT = 6  # tokens of an answer
CHANCES = {"=": {"a": 0.6, "b": 0.4}, "a": {"a": 0.3, "b": 0.2, "": 0.5}, "b": {"a": 0.4, "b": 0.5, "": 0.1}}
# Prompt and answer; "." is the token that ends it. The last one is cut off by the limit
ANSWERS = [("a1=", "abaa."), ("a1=", "bb."), ("b2c3=", "bba."), ("b2c3=", "ababab")]
REWARD = "def ends_in_a(completions, **kwargs):\n    return [float(text.endswith('a')) for text in completions]\n"
SETTINGS = {"future_kl_half_life": 32.0, "token_credit_every": 1, "delta": 10.0}


def value(letter, left):
    """V where `letter` is the last one and so many tokens may follow."""
    if not left:
        return float(letter == "a")
    chances = CHANCES[letter]
    return sum(p * (float(letter == "a") if x == "" else value(x, left - 1)) for x, p in chances.items())


def exact_credit(answer):
    """Of each token, from its definition."""
    states = [value("=", LIMIT)]
    for place, letter in enumerate(answer):
        ended = float(answer[place - 1] == "a")
        states.append(ended if letter == "." else value(letter, LIMIT - place - 1))
    return np.diff(states)


def make_policy(folder):
    """A Qwen2 whose layers add nothing: the logits are a function of the last token."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / BASE)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(64)[: len(tokenizer)])
        logits = torch.full((len(tokenizer), 64), -100.0)  # (next, last)
        for last, chances in CHANCES.items():
            for letter, p in chances.items():
                next_id = tokenizer.convert_tokens_to_ids(letter) if letter else tokenizer.eos_token_id
                logits[next_id, tokenizer.convert_tokens_to_ids(last)] = math.log(p)
        model.lm_head.weight.copy_(logits / 8)  # the norm makes 8 of the 1 of the embedding
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "checkpoint.json").write_text(
        json.dumps(
            {
                "files": {},
                "settings": {
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "top_k": 0,
                    "min_p": None,
                    "repetition_penalty": 1.0,
                    "max_completion_length": LIMIT,
                },
            }
        )
    )


def trace_rows(answers=ANSWERS, advantages=None):
    """With the exact credit as Future-KL, and its opposite as the log-ratio."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / BASE)
    rows = []
    for number, (prompt, answer) in enumerate(answers):
        letters = [letter if letter != "." else tokenizer.eos_token for letter in answer]
        credit = exact_credit(answer)
        reward = float(answer.rstrip(".").endswith("a"))
        rows.append(
            {
                "prompt": prompt,
                "tokens": letters,
                "completion_ids": tokenizer.convert_tokens_to_ids(letters),
                "reward": reward,
                "advantage": advantages[number] if advantages else 2 * reward - 1,
                "weight": np.clip(np.exp(credit), 1.0, 1.2),
                "future_kl": credit,
                "log_ratio": -credit,
                "state": [0] * len(letters),
                "dropped": False,
            }
        )
    return rows


def make_run(folder, rows):
    """A run of 8 updates a generation: what the second one made of the policy's answers."""
    make_policy(folder / "run" / "checkpoint-8")
    write_trace(folder / "run", 16, rows, SETTINGS | {"step": 16, "generation": 2})
    (folder / "ends_reward.py").write_text(REWARD)
    data = [{"prompt": prompt, "solution": ""} for prompt in ("c4=", "a1=", "b2c3=")]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    recipe = {
        "model_name_or_path": BASE,
        "dataset_name": str(folder / "data.jsonl"),
        "reward_funcs": ["ends_reward.ends_in_a"],
        "max_completion_length": LIMIT,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "output_dir": "unused",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose credit has been sampled."""
    folder = make_run(tmp_path_factory.mktemp("markov"), trace_rows())
    main(words(folder))
    return folder


def words(folder, *more):
    return [
        "--run",
        str(folder / "run"),
        "--config",
        str(folder / "recipe.yaml"),
        "--samples",
        "400",
        "--batch_size",
        "1200",
        *more,
    ]


def check_credit(results):
    """Of every token, within 5 standard errors, which must be about as large as the errors are."""
    tokens = pq.read_table(results / "tokens.parquet").to_pandas()
    assert len(tokens) == sum(len(answer) for _, answer in ANSWERS)
    errors = []
    for row, (_, answer) in enumerate(ANSWERS):
        of_answer = tokens[tokens.row == row]
        assert of_answer.position.tolist() == list(range(len(answer)))
        off, error = of_answer.credit.to_numpy() - exact_credit(answer), of_answer.error.to_numpy()
        assert np.abs(off[error == 0]).max(initial=0) < 1e-4
        errors.append(off[error > 0] / error[error > 0])
    errors = np.concatenate(errors)
    assert len(errors) >= 12
    assert np.abs(errors).max() < 5
    assert 0.2 < np.mean(errors**2) < 3


def test_credit_is_what_can_be_calculated(folder):
    check_credit(folder / "run/credit_fidelity")


def test_entropy_is_that_of_the_policy(folder):
    tokens = pq.read_table(folder / "run/credit_fidelity/tokens.parquet").to_pandas()
    for row, (_, answer) in enumerate(ANSWERS):
        chances = [CHANCES[letter].values() for letter in "=" + answer[:-1]]
        expected = [-sum(p * math.log(p) for p in row) for row in chances]
        assert tokens[tokens.row == row].entropy.tolist() == pytest.approx(expected, abs=1e-4)


def test_draws_from_a_nucleus():
    """As transformers keeps tokens: the likeliest ones, up to and with the one by which they reach top_p."""
    chances = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    for top_p, kept in ((1.0, [0.1, 0.5, 0.15, 0.25]), (0.7, [0, 0.5, 0, 0.25]), (0.4, [0, 0.5, 0, 0])):
        expected = np.array(kept) / sum(kept)
        assert nucleus(chances, top_p)[0].tolist() == pytest.approx(expected.tolist())


def test_other_half_lives(folder):
    tokens = pq.read_table(folder / "run/credit_fidelity/tokens.parquet").to_pandas()
    for row, (_, answer) in enumerate(ANSWERS):
        d = -exact_credit(answer)  # in the trace
        for half_life in HALF_LIVES:
            expected = [sum(2 ** (-k / half_life) * later for k, later in enumerate(d[t:])) for t in range(len(d))]
            assert tokens[tokens.row == row][f"future_kl_{half_life}"].tolist() == pytest.approx(expected, abs=1e-5)


def test_correlations_of_a_run(folder):
    """F is the true credit here, and the log-ratio its opposite."""
    results = json.loads((folder / "run/credit_fidelity/credit_fidelity.json").read_text())
    assert list(results["parts"]) == ["step 16"]
    groups = results["parts"]["step 16"]
    assert (groups["all"]["answers"], groups["right"]["answers"], groups["wrong"]["answers"]) == (4, 2, 2)
    for kind in ("within", "pooled"):
        of = {signal: tables["credit"][kind][0] for signal, tables in groups["all"]["correlations"].items()}
        assert of["future_kl"] > 0.9
        assert of["log_ratio"] == pytest.approx(-of["future_kl"])
        assert of["shuffled_future_kl"] < 0.8
        assert groups["all"]["ceiling"][kind] > 0.9
    assert groups["all"]["mean_error"] < 0.05
    tokens = pq.read_table(folder / "run/credit_fidelity/tokens.parquet").to_pandas()
    longer = [each for _, each in tokens.groupby("row") if len(each) > 3]
    by_position = [spearmanr(each.position, each.credit).statistic for each in longer]
    found = groups["all"]["correlations"]["position"]["credit"]["within"][0]
    assert found == pytest.approx(np.mean(by_position))


def test_what_is_done_is_not_done_again(folder, tmp_path):
    """After a kill in the middle of a line, the same command ends with the same results."""
    results, again = folder / "run/credit_fidelity", tmp_path / "again"
    shutil.copytree(results, again)
    lines = (again / "step_000016/samples.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > 8
    kept = b"".join(lines[:5])
    (again / "step_000016/samples.jsonl").write_bytes(kept + lines[5][:40])
    for name in ("tokens.parquet", "credit_fidelity.json"):
        (again / name).unlink()
    main(words(folder, "--output_dir", str(again)))
    for name in ("credit_fidelity.json", "tokens.parquet", "step_000016/samples.jsonl"):
        assert (again / name).read_bytes() == (results / name).read_bytes(), name


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_continues_too(folder, tmp_path):
    command = [sys.executable, "-m", "fipo_trl", "credit-fidelity", *words(folder, "--output_dir", str(tmp_path))]
    options = ["--backend", "vllm", "--dtype", "float32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    run = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    check_credit(tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "2"], "--samples=2 must be at least 4"),
        (["--step", "24"], "no trace of step 24, only of 16"),
        (["--policy", "nowhere"], "--policy is the policy of one trace. Give one --step"),
        (["--step", "16", "--policy", "nowhere"], "cannot load 'nowhere'"),
        (["--tensor_parallel_size", "2"], "is for --backend vllm"),
        (["--temperature", "0.7"], "temperature=0.7 by the recipe, but .* was trained with 1.0. Give --temperature 1"),
        (["--max_completion_length", "8"], "max_completion_length=8 by the recipe"),
        (["--top_k", "5"], "top_k, min_p or repetition_penalty is set"),
        (["--reward_funcs", "recipes.tiny.running_sums.exact_answer"], "had a reward of 1 in training, and has 0"),
        (["--dataset_name", "recipes/tiny/data"], "answers 'a1=', which is not in the data"),
        (["--samplse", "64"], "nothing reads 'samplse'"),
        (["--answers", "2"], "results with another 'answers': 64, not 2"),
    ],
)
def test_refused(folder, more, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=message):
        main(words(folder, *more))


def test_a_policy_that_was_not_kept(folder, tmp_path):
    """It is named, with the settings that keep it. Without --step, other traces are taken."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    rows = trace_rows()
    write_trace(run, 24, rows, SETTINGS | {"step": 24, "generation": 3})
    call = [*words(folder), "--run", str(run)]
    with pytest.raises(SystemExit, match=r"holds no checkpoint-16, .* of updates 17 to 24. Train with save_steps: 8"):
        main([*call, "--step", "24"])
    main(call)
    assert json.loads((run / "credit_fidelity/credit_fidelity.json").read_text())["steps"] == [16]
    shutil.rmtree(run / "checkpoint-8")
    with pytest.raises(SystemExit, match="holds no checkpoint-8"):
        main(call)
    write_trace(run, 24, rows, SETTINGS | {"step": 24, "generation": 7})
    with pytest.raises(SystemExit, match="did not begin at a multiple of its updates"):
        main([*call, "--step", "24"])


def test_a_trace_that_knows_no_rewards(folder, tmp_path):
    """As of a generation that was begun without traces: the recipe tells them."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    rows = [row | {"reward": math.nan} for row in trace_rows()]
    write_trace(run, 16, rows, SETTINGS | {"step": 16, "generation": 2})
    main([*words(folder), "--run", str(run)])
    check_credit(run / "credit_fidelity")


def test_answers_without_advantage_are_left_out(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.rmtree(run / "credit_fidelity")
    for advantages, rows in (([0.0, -1.0, 0.0, 1.0], {1, 3}), ([0.0] * 4, set())):
        write_trace(run, 16, trace_rows(advantages=advantages), SETTINGS | {"step": 16, "generation": 2})
        call = [*words(folder), "--run", str(run), "--samples", "8", "--output_dir", str(tmp_path / str(len(rows)))]
        if rows:
            main(call)
            assert {*pq.read_table(tmp_path / "2/tokens.parquet")["row"].to_pylist()} == rows
        else:
            with pytest.raises(SystemExit, match="No answer of these traces has an advantage"):
                main(call)


def test_a_trace_without_advantage_needs_no_weights(folder, tmp_path, capsys):
    """Beside one with: what is sampled is counted before it is."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.copytree(run / "checkpoint-8", run / "checkpoint-16")
    (run / "checkpoint-16/model.safetensors").unlink()
    rows = trace_rows(advantages=[0.0] * len(ANSWERS))
    write_trace(run, 24, rows, SETTINGS | {"step": 24, "generation": 3})
    main([*words(folder), "--run", str(run)])
    assert capsys.readouterr().out.startswith(
        "Traces: 2. Answers with an advantage: 4. Tokens: 18. Continuations: 14,400.\n"
    )
    assert json.loads((run / "credit_fidelity/credit_fidelity.json").read_text())["steps"] == [16, 24]
    assert not (run / "credit_fidelity/step_000024").exists()


# Statistics


def make_answers(count, seed, noise=0.0, step=8):
    """Answers whose credit is known, and estimated in halves; F is the true credit, the entropy is its size."""
    rng = np.random.default_rng(seed)
    answers = []
    for row in range(count):
        n = int(rng.integers(20, 30))
        true = rng.normal(size=n)
        halves = true + rng.normal(size=(2, n)) * noise * math.sqrt(2)
        signals = {"future_kl": true, "entropy": np.abs(true), "log_ratio": rng.normal(size=n)}
        signals |= {f"future_kl_{half_life}": rng.normal(size=n) for half_life in HALF_LIVES}
        signals |= {"weight": np.clip(np.exp(true), 1.0, 1.2), "shuffled_future_kl": rng.permutation(true)}
        answers.append(
            Answer(
                step=step,
                row=row,
                reward=1.0,
                advantage=1.0,
                positions=np.arange(n),
                credit=halves.mean(axis=0),
                error=np.full(n, noise),
                halves=halves,
                signals=signals,
            )
        )
    return answers


def test_ranks_are_spearmans():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, size=40).astype(float), rng.integers(0, 9, size=40).astype(float)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    times = rng.integers(0, 4, size=40)
    weighted = correlation(*(Ranks(values)(times.astype(float)) for values in (x, y)), times.astype(float))
    assert weighted == pytest.approx(spearmanr(np.repeat(x, times), np.repeat(y, times)).statistic)
    assert math.isnan(rank_correlation(np.ones(5), np.arange(5.0)))


def test_who_knows_the_true_credit_reaches_the_ceiling():
    answers = make_answers(400, seed=0, noise=0.7)
    found, halves, size = correlations(
        answers, [("future_kl", "credit"), ("first half", "second half"), ("entropy", "size")]
    )
    for kind in (0, 1):
        assert found[kind].value == pytest.approx(ceiling(halves[kind].value), abs=0.04)
        assert 0.7 < found[kind].value < 0.95
        assert found[kind].low < found[kind].value < found[kind].high
        assert size[kind].low > 0.2
    assert math.isnan(ceiling(-0.1))


def test_noise_has_no_size():
    """Were |credit| the target, credit that is all noise would have a size where the noise is large."""
    rng = np.random.default_rng(1)
    answers = []
    for answer in make_answers(400, seed=1):
        spread = np.exp(rng.normal(size=len(answer.positions)))
        halves = rng.normal(size=answer.halves.shape) * spread
        signals = answer.signals | {"entropy": spread}
        answers.append(answer._replace(halves=halves, credit=halves.mean(axis=0), signals=signals))
    (found,) = correlations(answers, [("entropy", "size")])
    assert all(abs(interval.value) < 0.06 for interval in found)
    assert spearmanr(*np.concatenate([[np.abs(a.credit), a.signals["entropy"]] for a in answers], axis=1))[0] > 0.4


def test_intervals_are_those_of_answers():
    """Tokens that are there ten times tell no more."""
    answers = make_answers(20, seed=2, noise=1.0)
    many = [
        answer._replace(
            positions=np.tile(answer.positions, 10),
            credit=np.tile(answer.credit, 10),
            error=np.tile(answer.error, 10),
            halves=np.tile(answer.halves, 10),
            signals={name: np.tile(values, 10) for name, values in answer.signals.items()},
        )
        for answer in answers
    ]
    (one,), (ten,) = (correlations(each, [("log_ratio", "credit")]) for each in (answers, many))
    for kind in (0, 1):
        assert ten[kind] == pytest.approx(one[kind], abs=1e-9)


def test_too_few_answers_have_no_interval():
    """Their value is given alone. Answers without a correlation do not count."""
    answers = make_answers(4, seed=3, noise=1.0)
    short = [answer._replace(signals=answer.signals | {"weight": np.ones(len(answer.credit))}) for answer in answers]
    for members, intervals in ((answers[:2], (0, 0)), (answers[:3], (1, 1)), ([*answers[:2], *short[2:]], (0, 1))):
        (pair,) = correlations(members, [("weight", "credit")])
        for interval, there in zip(pair, intervals, strict=True):
            assert math.isfinite(interval.value)
            assert math.isnan(interval.low) == math.isnan(interval.high) == (not there)
            assert ("[" in cell(interval)) == there
    assert cell((0.25, math.nan, math.nan)) == "+0.25"
    assert cell((math.nan,) * 3) == "-"


def test_parts_have_about_as_many_answers():
    answers = [
        answer
        for step, count in ((8, 6), (16, 5), (24, 3), (32, 2), (40, 2))
        for answer in make_answers(count, seed=step, step=step)
    ]
    parts = parts_of(answers, 3)
    assert {name: len(members) for name, members in parts.items()} == {
        "step 8": 6,
        "step 16": 5,
        "steps 24 to 40": 7,
        WHOLE: 18,
    }
    assert list(parts_of(answers[:6], 3)) == ["step 8"]


# A run of the trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fipo", "fipo_lora"])
def test_a_run_of_the_tiny_task(name, tmp_path, monkeypatch, capsys):
    """Its checkpoints (or adapters) and traces are what is read; the first generation is the base's."""
    monkeypatch.chdir(ROOT)
    recipe = ["--config", f"recipes/tiny/{name}.yaml"]
    small = ["--token_credit_every", "1", "--save_steps", "8", "--max_steps", "16"]
    own = ["--output_dir", str(tmp_path), "--disable_tqdm", "true", "--seed", "1"]
    build(read_and_validate([*recipe, *small, *own])).train()
    main(["--run", str(tmp_path), *recipe, "--answers", "4", "--positions", "4", "--samples", "8"])
    results = json.loads((tmp_path / "credit_fidelity/credit_fidelity.json").read_text())
    assert results["steps"] == [8, 16]
    assert results["parts"].keys() == {"step 8", "step 16", WHOLE}
    assert results["parts"][WHOLE]["all"]["answers"] == 8
    policies = [
        json.loads((tmp_path / f"credit_fidelity/step_{step:06d}/settings.json").read_text())["policy"]
        for step in (8, 16)
    ]
    assert policies == ["base", "checkpoint-8"]
    printed = capsys.readouterr().out
    assert all(title in printed for title in SIGNALS.values())
    assert (tmp_path / "credit_fidelity/credit_fidelity.png").stat().st_size > 10_000
