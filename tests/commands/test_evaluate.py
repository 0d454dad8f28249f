"""The command that evaluates a saved model, with transformers, and with vLLM where it is installed."""

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from datasets import Dataset, load_dataset
from held import HeldRun
from peft import LoraConfig, get_peft_model
from tiny import BASE, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fipo_trl.commands.evaluate import beside, read_options
from fipo_trl.commands.evaluate import run as evaluate
from fipo_trl.data.sources import load_splits
from fipo_trl.evaluation.statistics import per_problem
from fipo_trl.evaluation.tables import compare, table
from recipes.tiny.running_sums import exact_answer, predicted_answer


REWARD = "held.exact_answer"  # the tiny task's
FILES = ("samples.jsonl", "summary.json", "completions.parquet")


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join((ROOT / BASE / "../data/test.jsonl").read_text().splitlines(keepends=True)[:12]))
    return path


def arguments(problems, output_dir, **settings):
    defaults = {"model": BASE, "dataset": problems, "n": 4, "max_tokens": 100, "batch_size": 8, "reward": REWARD}
    pairs = (defaults | settings | {"output_dir": output_dir}).items()
    return [text for name, value in pairs for text in (f"--{name}", str(value))]


def run(problems, output_dir, **settings):
    evaluate(read_options(arguments(problems, output_dir, **settings)))
    return output_dir / "sums"


@pytest.fixture(scope="module")
def results(problems, tmp_path_factory):
    return run(problems, tmp_path_factory.mktemp("whole"))


def contents(folder):
    return [(folder / name).read_bytes() for name in FILES]


def test_results_follow_from_the_completions(results, problems, capsys):
    rows = load_dataset("parquet", data_files=str(results / "completions.parquet"), split="train").to_list()
    given = [json.loads(line) for line in problems.read_text().splitlines()]
    assert [(row["problem"], row["sample"]) for row in rows] == [(p, s) for p in range(12) for s in range(4)]
    assert [(row["prompt"], row["solution"]) for row in rows[::4]] == [
        (row["prompt"], row["solution"]) for row in given
    ]
    rewards = exact_answer([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert [row["correct"] for row in rows] == [reward == 1.0 for reward in rewards]
    assert [row["answer"] for row in rows] == [predicted_answer(row["completion"]) for row in rows]
    assert [row["length"] for row in rows] == [len(row["completion"]) + (not row["truncated"]) for row in rows]
    assert len({row["completion"] for row in rows}) > 12
    assert sum(row["truncated"] for row in rows) < 5  # the base ends nearly all answers before 100 tokens

    def of_problems(key):
        return [[row[key] for row in rows[first : first + 4]] for first in range(0, 48, 4)]

    metrics = per_problem(*map(of_problems, ("correct", "answer", "length", "truncated")))
    summary = json.loads((results / "summary.json").read_text())
    assert {name: values.mean() for name, values in metrics.items()} == pytest.approx(
        {name: interval["value"] for name, interval in summary["metrics"].items()}
    )
    assert all(interval["low"] <= interval["value"] <= interval["high"] for interval in summary["metrics"].values())
    assert summary["settings"]["n"] == 4


def test_finished_results_are_shown_again_and_not_changed(results, problems, capsys):
    before = contents(results)
    run(problems, results.parent)
    assert contents(results) == before
    output = capsys.readouterr().out
    assert "sums: 12 problems x 4 samples, temperature 1.0, top-p 0.7, at most 100 tokens (transformers)" in output
    value = json.loads((results / "summary.json").read_text())["metrics"]["cons@4"]["value"]
    assert f"cons@4{value:17.1%}" in output
    assert "paper" not in output.lower()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(results, problems, tmp_path):
    command = [sys.executable, "scripts/evaluate.py", *arguments(problems, tmp_path)]
    samples = tmp_path / "sums" / "samples.jsonl"
    # Six batches of two problems; the reward is called once before them, for a check
    with HeldRun(command, tmp_path / "held", generation=5):
        pass
    written = samples.read_bytes()
    lines = contents(results)[0].splitlines(keepends=True)
    assert written == b"".join(lines[:6])
    samples.write_bytes(written + lines[6][:-20])
    run(problems, tmp_path)
    assert contents(tmp_path / "sums") == contents(results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 5}, r"another 'n': 4, not 5\. They cannot be mixed\. Give another --output_dir"),
        ({"top_p": 0.8}, r"another 'top_p': 0\.7, not 0\.8"),
        ({"seed": 1}, "another 'seed': 0, not 1"),
        ({"dtype": "bfloat16"}, "another 'dtype': auto, not bfloat16"),
        ({"batch_size": 12}, "another 'batch_size': 8, not 12"),
    ],
)
def test_other_settings_are_not_mixed_in(results, problems, settings, message):
    before = contents(results)
    with pytest.raises(ValueError, match=message):
        run(problems, results.parent, **settings)
    assert contents(results) == before


def test_other_weights_and_problems_are_not_mixed_in(results, problems, tmp_path):
    shutil.copytree(BASE, tmp_path / "model")
    run(problems, tmp_path / "out", model=tmp_path / "model", n=1)
    (tmp_path / "model" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="another 'weights'"):
        run(problems, tmp_path / "out", model=tmp_path / "model", n=1)
    other = tmp_path / "sums.jsonl"
    other.write_text(problems.read_text().replace('"solution": "2"', '"solution": "3"'))
    with pytest.raises(ValueError, match="another 'problems_sha256'"):
        run(other, results.parent)


def test_two_processes_do_not_write_to_one_file(results, problems):
    with open(results / "samples.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Another process is evaluating into"):
            run(problems, results.parent)


def greedy(model, prompts):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = []
    for prompt in prompts:
        output = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=100)
        texts.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return texts


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter of the tiny base that changes its answers, as TRL saves one, and the model with it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_rslora=True)
    model = get_peft_model(model, config)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder, model


def completions(folder):
    rows = [json.loads(line)["samples"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [[sample["completion"] for sample in row] for row in rows]


def test_adapters_are_merged_into_their_base(adapter, problems, tmp_path):
    folder, model = adapter
    answers = completions(run(problems, tmp_path, model=folder, top_p=1e-6, n=2))
    prompts = [json.loads(line)["prompt"] for line in problems.read_text().splitlines()]
    assert answers == [[text, text] for text in greedy(model, prompts)]
    with model.disable_adapter():
        assert answers != [[text, text] for text in greedy(model, prompts)]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_answers_as_transformers(adapter, problems, tmp_path):
    """Greedily, an adapter's base included; and in two halves as in one go."""
    folder, model = adapter
    settings = {"model": folder, "top_p": 1e-6, "n": 2, "backend": "vllm", "dtype": "float32"}
    command = [sys.executable, "scripts/evaluate.py", *arguments(problems, tmp_path, **settings)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    prompts = [json.loads(line)["prompt"] for line in problems.read_text().splitlines()]
    assert completions(tmp_path / "sums") == [[text, text] for text in greedy(model, prompts)]
    assert not (tmp_path / "merged-model").exists()
    assert "vllm" in json.loads((tmp_path / "sums" / "settings.json").read_text())["versions"]


def test_compare(results, problems, tmp_path):
    other = run(problems, tmp_path, top_p=0.3)
    output = compare(results, other)
    assert "12 problems x 4 samples. Different: top_p (0.7, 0.3)" in output
    values = [
        json.loads((folder / "summary.json").read_text())["metrics"]["avg@4"]["value"] for folder in (results, other)
    ]
    assert f"avg@4{values[0]:18.1%}{values[1]:9.1%}{values[1] - values[0]:9.1%}" in output
    assert "B - A  95% interval, paired" in output
    identical = compare(results, results)
    assert "Different: nothing" in identical
    assert "0.0%  [0.0%, 0.0%]" in identical


def test_compare_refuses_what_cannot_be_paired(results, problems, tmp_path):
    with pytest.raises(ValueError, match=r"holds no summary\.json\. Give the folder of one dataset"):
        compare(results, results.parent)
    few = tmp_path / "sums.jsonl"
    few.write_text("".join(problems.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(ValueError, match="needs the same problems, but 'problems_sha256' is"):
        compare(results, run(few, tmp_path / "few"))
    with pytest.raises(ValueError, match="needs equally many samples, but 'n' is 4 in"):
        compare(results, run(problems, tmp_path / "n", n=2))


def test_other_columns_and_rewards(tmp_path, capsys):
    """`problem` and `answer`, a whole number, are asked in DAPO's words; other rewards may know no answers."""
    Dataset.from_dict({"problem": ["1 + 1?", "2 + 3?"], "answer": [2, 5]}).to_json(tmp_path / "x.jsonl")
    shutil.copytree(BASE, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[-1].content[-4:] }}="
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    shared = {"model": tmp_path / "model", "n": 2, "max_tokens": 8}
    evaluate(
        read_options(
            arguments(f"aime24={tmp_path / 'x.jsonl'}", tmp_path / "dapo", **shared | {"reward": "dapo_accuracy"})
        )
    )
    rows = load_dataset("parquet", data_files=str(tmp_path / "dapo/aime24/completions.parquet"), split="train")
    assert "1 + 1?" in rows[0]["prompt"][0]["content"]
    assert rows["solution"][::2] == ["2", "5"]
    assert set(rows["answer"]) == {"[INVALID]"}
    level = tmp_path / "level.jsonl"
    level.write_text(
        '{"prompt": "a1b2=", "solution": "3", "level": 1}\n{"prompt": "a1b3=", "solution": "4", "level": 0}\n'
    )
    evaluate(read_options(arguments(level, tmp_path / "own", **shared | {"reward": "rewards_for_tests.needs_column"})))
    output = capsys.readouterr().out
    assert "avg@2             50.0%  [0.0%, 100.0%]" in output
    assert "No cons@n: there is no predicted_answer(completion) in the module of the reward function." in output


def test_the_papers_numbers_stand_beside_those_of_its_models():
    metrics = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("avg@32", "cons@32", "pass@2", "pass@32")}
    shared = {
        "problems": 30,
        "temperature": 1.0,
        "top_p": 0.7,
        "max_tokens": 20480,
        "backend": "vllm",
        "has_answers": True,
    }

    def lines(name="aime24", n=32, hidden_size=5120, num_hidden_layers=64):
        summary = {"settings": shared | {"n": n}, "metrics": metrics, "length_quartiles": [1.0, 2.0, 3.0]}
        config = SimpleNamespace(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
        text = table(name, summary, *beside(name, summary["settings"], config))
        return {line.split()[0]: line.split() for line in text.splitlines() if line}

    assert lines()["avg@32"] == ["avg@32", "50.0%", "[40.0%,", "60.0%]", "50%", "56%"]
    assert lines()["pass@32"][-2:] == ["80%", "83%"]
    assert lines()["pass@2"][-1] == "60.0%]"
    assert lines("aime25", hidden_size=3584, num_hidden_layers=28)["avg@32"][-3:] == ["18%", "18%", "19%"]
    for other in ({"name": "sums"}, {"n": 16}, {"hidden_size": 3584}):
        assert "Paper" not in " ".join(lines(**other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such-model"}, "model: cannot load 'no/such-model' "),
        ({"model": "recipes/tiny"}, "recipes/tiny holds neither config.json nor adapter_config.json. Give the folder"),
        ({"dataset": "no/such-data"}, r"--dataset: cannot load 'no/such-data'"),
        ({"dataset": "recipes/tiny/base"}, "--dataset: cannot load"),
        ({"reward": "dapo_acuracy"}, "--reward: cannot load 'dapo_acuracy'"),
        (
            {"reward": "rewards_for_tests.needs_column"},
            "has no column 'level', which rewards_for_tests.needs_column reads",
        ),
        (
            {"reward": "dapo_reward"},
            r"dapo_reward gave .*needs a reward function that gives 1 \(right\) or 0 \(wrong\)",
        ),
        ({"max_tokens": 300}, r"max_tokens=300 and the longest prompt \(13 tokens\).*Set max_tokens to 243"),
        ({"max_tokens": 0}, "--max_tokens=0 must be at least 1"),
        ({"batch_size": 0}, "--batch_size=0 must be at least 1"),
        ({"n": 0}, "--n=0 must be at least 1"),
        ({"n": "many"}, "argument --n: invalid int value: 'many'"),
        ({"top_p": 1.5}, r"--top_p=1\.5 must be greater than 0 and at most 1"),
        ({"temperature": 0}, r"--temperature=0\.0 must be greater than 0: without randomness"),
        ({"dtype": "int4"}, "argument --dtype: invalid choice: 'int4'"),
        ({"tensor_parallel_size": 2}, "--tensor_parallel_size=2 is for --backend vllm"),
        ({"top-p": 0.5}, "unrecognized arguments: --top-p 0.5"),
    ],
)
def test_wrong_input_is_refused(problems, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(problems, tmp_path, **settings)


def test_a_folder_of_checkpoints_names_them(problems, tmp_path):
    (tmp_path / "run" / "checkpoint-8").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Give one of its checkpoints, checkpoint-8\."):
        run(problems, tmp_path / "out", model=tmp_path / "run")


@pytest.mark.slow
def test_an_unreachable_hub_is_found_out_at_once(problems, tmp_path):
    """After one try. (transformers and datasets would make up to five, with pauses.)"""
    tries = []

    class HangUp(socketserver.StreamRequestHandler):
        def handle(self):
            tries.append(self.rfile.readline())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangUp) as server:
        threading.Thread(target=server.serve_forever).start()
        environment = os.environ | {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        }
        command = [sys.executable, "scripts/evaluate.py", *arguments(problems, tmp_path, model="Qwen/Qwen2.5-32B")]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        server.shutdown()
    assert len([line for line in tries if b"Qwen2.5-32B" in line]) == 1
    assert process.returncode == 1
    assert process.stderr.startswith("error: model: cannot load 'Qwen/Qwen2.5-32B'")
    assert "Without a network, download it elsewhere" in process.stderr


def test_the_held_out_problems_of_a_task(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    settings = {"size": 20, "test_size": 3, "seed": 4, "max_value": 50}
    task = {"reward": "reasoning_gym_accuracy", "model": tmp_path / "model", "n": 2, "max_tokens": 4}
    task |= {"dataset_settings": json.dumps(settings)}
    run("reasoning_gym/gcd", tmp_path / "out", **task)
    summary = json.loads((tmp_path / "out" / "gcd" / "summary.json").read_text())
    assert summary["settings"]["dataset_settings"] == settings
    assert summary["settings"]["versions"]["reasoning_gym"] == importlib.metadata.version("reasoning-gym")
    assert summary["metrics"].keys() >= {"avg@2", "cons@2"}
    completions = load_dataset("parquet", data_files=str(tmp_path / "out/gcd/completions.parquet"), split="train")
    held_out = load_splits("reasoning_gym/gcd", task_settings=settings)["test"]
    assert completions["prompt"][::2] == held_out["prompt"][:]
    for other in ({"seed": 5}, {"max_value": 60}):
        with pytest.raises(ValueError, match="holds results with another 'dataset_settings'"):
            run("reasoning_gym/gcd", tmp_path / "out", **task | {"dataset_settings": json.dumps(settings | other)})


@pytest.mark.parametrize(
    ("dataset", "value", "message"),
    [
        ("aime24", "{}", "--dataset_settings is for one --dataset reasoning_gym/<task>"),
        ("reasoning_gym/gcd", "{size}", "--dataset_settings={size} is not valid JSON"),
        ("gcd=reasoning_gym/gcd", '"size"', '--dataset_settings="size" must be a mapping'),
    ],
)
def test_dataset_settings_that_are_refused(dataset, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_options(["--model", BASE, "--dataset", dataset, "--dataset_settings", value])
    with pytest.raises(ValueError, match="is for one --dataset"):
        read_options(
            ["--model", BASE, "--dataset_settings", "{}", "--dataset", "reasoning_gym/gcd", "reasoning_gym/lcm"]
        )
