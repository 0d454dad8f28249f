"""Data in DAPO's schema: each problem once, malformed rows named, the trainer's dataset built from a recipe."""

import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from datasets import Dataset
from tiny import make_model
from transformers import AutoTokenizer

from fipo_trl.data import dapo_math, sources
from fipo_trl.data.dapo_math import dapo_prompt, first_of_equals, from_dapo, is_dapo
from fipo_trl.data.sources import load_problems, load_splits
from fipo_trl.recipe.build import build, trainer_arguments
from fipo_trl.recipe.validate import read_and_validate
from fipo_trl.rewards.names import load_rewards


BASE = str(ROOT / "recipes" / "tiny" / "base")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def row(problem, answer="1", **columns):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": problem, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id of {problem}"},
    } | columns


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def load(path, rows, **settings):
    return from_dapo(load_splits(write(path, rows))["train"], **settings)


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(BASE)  # one token per character
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_dapo_prompt_is_the_papers():
    assert dapo_prompt("What is 1 + 1?") == [
        {
            "role": "user",
            "content": "Solve the following math problem step by step. The last line of your response should be of "
            "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 1 + 1?"
            '\n\nRemember to put your answer on its own line after "Answer:".',
        }
    ]


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl", "data.json"])
def test_each_prompt_once_in_the_order_of_the_file(tmp_path, name, caplog, monkeypatch):
    monkeypatch.setattr(dapo_math, "READ_AT_ONCE", 7)  # equal rows lie in different batches
    caplog.set_level(logging.INFO)
    rows_read, read = [], dapo_math.read
    monkeypatch.setattr(dapo_math, "read", lambda row, **columns: rows_read.append(row) or read(row, **columns))
    problems = [row(f"problem {i}", str(i)) for i in (3, 1, 2)]
    dataset = load(tmp_path / name, problems * 20)
    assert rows_read == [0, 1, 2]  # the others never became Python objects
    assert dataset.column_names == ["prompt", "solution"]
    assert list(dataset["prompt"]) == [problem["prompt"] for problem in problems]  # the rows' own words
    assert list(dataset["solution"]) == ["3", "1", "2"]
    assert "60 rows read, 57 repeated, 0 prompts with contradictory answers, 0 over-long, 3 kept" in caplog.text


def test_a_folder(tmp_path):
    write(tmp_path / "train.parquet", [row("a")] * 2)
    write(tmp_path / "test.parquet", [row("b")] * 2)
    splits = load_splits(str(tmp_path))
    assert [from_dapo(splits[name])["prompt"][0][0]["content"] for name in ("train", "test")] == ["a", "b"]


def test_what_makes_prompts_differ(tmp_path):
    system, user = {"role": "system", "content": "a"}, {"role": "user", "content": "b"}
    prompts = [[system, user], [user], [user, system], [{"role": "user", "content": "a"}, user]]
    rows = [row("", prompt=prompt) for prompt in prompts]
    dataset = load(tmp_path / "data.parquet", rows * 2)
    assert list(dataset["prompt"]) == prompts


def test_rows_that_differ_elsewhere_are_repeated(tmp_path):
    rows = [row("a"), row("a", extra_info={"index": "other"}), row("a", reward_model={"ground_truth": "1"})]
    assert len(load(tmp_path / "data.parquet", rows)) == 1


def test_equal_rows_are_dropped_before_they_become_python_objects(monkeypatch):
    monkeypatch.setattr(dapo_math, "READ_AT_ONCE", 4)
    a, b, missing = ([{"role": "user", "content": content}] for content in ("a", "b", None))
    prompts = [a, b, a, [*a, *b], [], missing, b, [*a, *b], missing, []]
    dataset = Dataset.from_dict({"prompt": prompts, "reward_model": [{"ground_truth": "1", "style": None}] * 10})
    assert first_of_equals(dataset) == [0, 1, 3, 4, 5]
    answers = [{"ground_truth": answer, "style": None} for answer in "1213"]
    assert first_of_equals(Dataset.from_dict({"prompt": [a] * 4, "reward_model": answers})) == [0, 1, 3]


def test_contradictory_answers_leave_out_the_prompt(tmp_path, caplog):
    rows = [row("a", "1"), row("b", "1,000"), row("a", "2"), row("b", "$1000$"), row("a", "1"), row("c")]
    dataset = load(tmp_path / "data.parquet", rows)
    assert [prompt[0]["content"] for prompt in dataset["prompt"]] == ["b", "c"]
    assert dataset["solution"][0] == "1,000"  # the reward takes both for the same
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "6 rows read, 3 repeated, 1 prompts with contradictory answers, 0 over-long, 2 kept" in record.message


def test_over_long_prompts(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    rows = [row("abcd"), row("abcde"), row("abcdef")] * 3
    dataset = load(tmp_path / "data.parquet", rows, tokenizer=tokenizer, max_prompt_length=6)  # "abcde" + "="
    assert [prompt[0]["content"] for prompt in dataset["prompt"]] == ["abcd", "abcde"]
    assert "9 rows read, 6 repeated, 0 prompts with contradictory answers, 1 over 6 tokens, 2 kept" in caplog.text
    with pytest.raises(ValueError, match=r"No prompt is left .* 3 over 4 tokens, 0 kept. Raise max_prompt_length"):
        load(tmp_path / "data.parquet", rows, tokenizer=tokenizer, max_prompt_length=4)
    with pytest.raises(ValueError, match=r"1 prompts with contradictory answers, 0 over 4 tokens, 0 kept"):
        load(tmp_path / "other.parquet", [row("a", "1"), row("a", "2")], tokenizer=tokenizer, max_prompt_length=4)
    tokenizer.chat_template = None
    for missing in (tokenizer, None):
        with pytest.raises(ValueError, match="max_prompt_length=6 needs a tokenizer with a chat template"):
            load(tmp_path / "data.parquet", rows, tokenizer=missing, max_prompt_length=6)


PROMPT = "column 'prompt': must be a list of messages"
REWARD = "column 'reward_model': must hold 'ground_truth', a text or a whole number"


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl"])
@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        (row("a", prompt=None), PROMPT),
        (row("a", prompt=[]), PROMPT),
        (row("a", prompt=[None]), PROMPT),
        (row("a", prompt=[{"role": "user", "content": None}]), PROMPT),
        (row("a", prompt=[{"role": None, "content": "a"}]), PROMPT),
        (row("a", prompt=[{"role": "user"}]), PROMPT),
        (row(" \n"), PROMPT),
        (row("a", None), REWARD),
        (row("a", " "), REWARD),
        (row("a", reward_model=None), REWARD),
        (row("a", reward_model={}), REWARD),
    ],
)
def test_malformed_rows(tmp_path, name, malformed, message):
    rows = [row("a"), row("b")] * 3 + [malformed] * 2 + [row("c"), row("d", None)]
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        load(tmp_path / name, rows)
    assert f"Row 6 (the first is 0) is malformed in {message}" in str(error.value)


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        (row("a", prompt="What is 1 + 1?"), f"{PROMPT} with 'role' and 'content', the last one not blank, got 'What"),
        (row("a", prompt=[{"content": "a"}]), PROMPT),
        (row("a", prompt=["a"]), PROMPT),
        (row("a", 1.5), REWARD),
        (row("a", True), REWARD),
        (row("a", reward_model="1"), REWARD),
        ({key: value for key, value in row("a").items() if key != "reward_model"}, REWARD),
    ],
)
def test_malformed_rows_of_another_type(tmp_path, malformed, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load(tmp_path / "data.jsonl", [row("a"), row("b")] * 3 + [malformed, row("d", None)])
    assert f"Row 6 (the first is 0) is malformed in {message}" in str(error.value)


@pytest.mark.parametrize("answers", [(7, 8, 7), ("7", 8, 7)])
def test_whole_numbers_are_answers(tmp_path, answers):
    rows = [row(problem, answer) for problem, answer in zip("aba", answers, strict=True)]
    assert list(load(tmp_path / "data.jsonl", rows)["solution"]) == ["7", "8"]


def test_a_column_of_another_type(tmp_path):
    with pytest.raises(ValueError, match=r"Row 0 .* column 'prompt': must be a list of messages .* got 'text'"):
        load(tmp_path / "data.parquet", [row("a", prompt="text")])


def test_no_rows():
    empty = Dataset.from_dict({"prompt": [], "reward_model": []})
    with pytest.raises(ValueError, match="No prompt is left to train on: 0 rows read"):
        from_dapo(empty)


def test_a_streamed_dataset_is_refused(tmp_path):
    splits = load_splits(write(tmp_path / "data.parquet", [row("a")]), streaming=True)
    with pytest.raises(ValueError, match="Set dataset_streaming: false"):
        from_dapo(splits["train"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nowhere", ""), ("nobody/nothing", ""), ("data.csv", "a file must end in .parquet, .jsonl, .json")],
)
def test_what_cannot_be_loaded(tmp_path, name, reason, monkeypatch):
    (tmp_path / "data.csv").write_text("prompt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot load '{name}' \({reason}.* Give a local folder or file"):
        load_splits(name)


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    asked = []

    def unreachable(self, name, timeout):
        asked.append((name, timeout))
        raise ConnectionError("no route to host")

    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(sources.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **kwargs: pytest.fail("it would try again and again"))
    with pytest.raises(
        ValueError, match=r"\(no route to host\).* set HF_HUB_OFFLINE=1 if this machine's cache has it"
    ):
        load_splits("BytedTsinghua-SIA/DAPO-Math-17k")
    assert asked == [("BytedTsinghua-SIA/DAPO-Math-17k", 10)]


def test_recognised_by_its_columns():
    assert is_dapo(["data_source", "prompt", "ability", "reward_model", "extra_info"])
    assert not is_dapo(["prompt", "solution"])
    assert not is_dapo(["prompt", "solution", "reward_model"])
    assert not is_dapo(None)


def recipe(path, tmp_path, *arguments):
    config = ["--config", str(ROOT / "recipes" / "tiny" / "fipo.yaml"), "--output_dir", str(tmp_path / "out")]
    return read_and_validate(
        [*config, "--dataset_name", str(path), "--reward_funcs", "dapo_reward", *map(str, arguments)]
    )


def test_the_script_builds_the_trainers_dataset(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    make_model().config.save_pretrained(tmp_path / "model")
    path = write(tmp_path / "data.parquet", [row("abc", "7"), row("abcdefgh", "8")] * 16)
    model = ["--model_name_or_path", tmp_path / "model"]
    kept = trainer_arguments(recipe(path, tmp_path, *model, "--max_prompt_length", 6))["train_dataset"]
    assert kept.to_list() == [{"prompt": [{"content": "abc", "role": "user"}], "solution": "7"}]
    everything = trainer_arguments(recipe(path, tmp_path, *model))["train_dataset"]
    assert len(everything) == 2


def test_the_trainer_reads_the_dataset(tmp_path):
    rows = [row(f"a{i}b{j}=", str(i + j)) for i in range(5) for j in range(5)]
    path = write(tmp_path / "data.parquet", rows * 2)
    trainer = build(recipe(path, tmp_path, "overlong_penalty"))
    trainer.processing_class.chat_template = TEMPLATE
    assert len(trainer.train_dataset) == 25
    batch = next(iter(trainer.get_train_dataloader()))
    assert {"prompt", "solution"} <= batch[0].keys()
    names = [function.__name__ for function in trainer.reward_funcs]
    assert names == ["dapo_reward", "soft_overlong_punishment_reward"]


def test_the_script_names_the_split_of_a_malformed_row(tmp_path):
    path = write(tmp_path / "data.parquet", [row("a"), row("b", None)])
    with pytest.raises(ValueError, match=r"^Split 'train' of the dataset: Row 1 .* column 'reward_model'"):
        build(recipe(path, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_prompt_length", 6], "max_prompt_length is for data in the schema of DAPO-Math-17k or of a public"),
        (["--overlong_buffer", 6], "overlong_buffer does nothing without the reward overlong_penalty"),
        (["overlong_penalty", "--overlong_buffer", 0], "overlong buffer=0 must be at least 1"),
        (["overlong_penalty", "--overlong_buffer", 129], "at most max_completion_length=128"),
    ],
)
def test_settings_that_the_script_refuses(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(recipe(ROOT / "recipes" / "tiny" / "data", tmp_path, *arguments))


def test_overlong_penalty_takes_its_buffer_from_the_recipe(tmp_path):
    for arguments, expected in [([], [0.0, 0.0, -1.0]), (["--overlong_buffer", 64], [0.0, -38 / 64, -1.0])]:
        run, training = (parsed := recipe("unused", tmp_path, "overlong_penalty", *arguments)).run, parsed.training
        _, penalty = load_rewards(run.reward_funcs, training.max_completion_length, run.overlong_buffer)
        # 128 tokens at most; a fifth of them is 25
        assert penalty(completion_ids=[[0] * 64, [0] * 102, [0] * 128]) == expected


AIME_ROWS = {"problem": ["1 + 1?", "2 + 2?"], "answer": [2, 4]}


def test_problems_to_evaluate_on_come_in_three_schemas(tmp_path):
    Dataset.from_dict(AIME_ROWS).to_json(tmp_path / "a=b.jsonl")
    name, problems = load_problems(str(tmp_path / "a=b.jsonl"))  # a path that is there is no NAME=SOURCE
    assert name == "a=b"
    assert problems.to_list()[1] == {"prompt": dapo_prompt("2 + 2?"), "solution": "4"}

    rows = [{"prompt": dapo_prompt("1?"), "reward_model": {"ground_truth": "1"}, "extra_info": i} for i in range(32)]
    Dataset.from_list(rows).to_parquet(tmp_path / "aime-2024.parquet")
    name, problems = load_problems(f"aime24={tmp_path / 'aime-2024.parquet'}")
    assert (name, problems.to_list()) == ("aime24", [{"prompt": dapo_prompt("1?"), "solution": "1"}])

    name, problems = load_problems("recipes/tiny/data/")
    assert (name, len(problems)) == ("data", 200)  # the split 'test'
    assert problems.column_names == ["prompt", "solution"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["1?"], "answer": [1]}, "has the columns question, answer. Problems need 'prompt' and"),
        ({"prompt": ["1?", None], "solution": ["1", "2"]}, r"row 1 of .* has prompt None and solution '2'"),
        ({"prompt": ["1?"], "solution": [0.5]}, r"row 0 of .* has prompt '1\?' and solution 0\.5.*as text"),
        ({"problem": [""], "answer": [1]}, "row 0 of .* has prompt None"),
    ],
)
def test_problems_that_cannot_be_asked_are_refused(tmp_path, columns, message):
    Dataset.from_dict(columns).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=rf"^eval_problems: .*{message}"):
        load_problems(str(tmp_path / "x.parquet"), "eval_problems")


def test_several_splits_need_one_called_test(tmp_path):
    for split in ("train", "validation"):
        Dataset.from_dict(AIME_ROWS).to_json(tmp_path / f"{split}.jsonl")
    with pytest.raises(ValueError, match=r"has the splits train, validation, but no 'test'\. Give one file"):
        load_problems(str(tmp_path))
