"""The programming problems of this repository: right programs pass their tests, and wrong ones do not."""

import json
import sys

import pytest
import yaml
from conftest import ROOT

from fipo_trl.data.code_problems import from_code
from fipo_trl.data.sources import load_splits
from fipo_trl.rewards.code_tests import code_accuracy, code_reward
from fipo_trl.trainer.metrics import CHECK_BY_EXAMPLE_PATTERN, PLAN_PATTERN, count_self_checks


DATA = ROOT / "recipes/code/data"
# By the names of the problems: a program that is right, and one with a mistake that one makes
SOLUTIONS = {
    row["name"]: row for row in map(json.loads, (ROOT / "tests/recipes/code_solutions.jsonl").read_text().splitlines())
}


@pytest.fixture(scope="module")
def rows():
    splits = load_splits(str(DATA))
    tests = {split: from_code(splits[split])["tests"][:] for split in ("train", "test")}
    return {split: list(zip(splits[split], tests[split], strict=True)) for split in splits}


def easy_rows():
    """Names and tests of the functions of one line, whose rows are as a trainer reads them."""
    splits = load_splits(str(ROOT / "recipes/code/easy"))
    return {split: [(json.loads(each)["names"][0], each) for each in splits[split]["tests"]] for split in splits}


def test_each_problem_stands_once_and_in_one_split(rows):
    assert {split: len(found) for split, found in rows.items()} == {"train": 48, "test": 12}
    found = [row for split in rows.values() for row, _ in split]
    easy = easy_rows()
    assert {split: len(found) for split, found in easy.items()} == {"train": 24, "test": 8}
    names = {f"easy: {name}" for split in easy.values() for name, _ in split}
    assert {row["name"] for row in found} | names == SOLUTIONS.keys()
    assert len({row["problem"] for row in found}) == 60


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of what Linux has")
def test_what_is_right_passes_and_what_is_wrong_does_not(rows):
    found = [(row["name"], tests) for split in rows.values() for row, tests in split]
    found += [(f"easy: {name}", tests) for split in easy_rows().values() for name, tests in split]
    tests = [each for _, each in found]
    for kind, expected in [("right", 1.0), ("wrong", 0.0)]:
        answers = [f"So:\n```python\n{SOLUTIONS[name][kind]}\n```" for name, _ in found]
        scores = code_accuracy(answers, tests)
        assert {name for (name, _), score in zip(found, scores, strict=True) if score != expected} == set()
    partial = code_reward(answers, tests)  # of the wrong ones, whose mistakes are not in every case
    assert sum(0 < reward < 1 for reward in partial) > 30


def test_recipes_look_for_the_behaviours_of_programmers():
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        if "code_reward" in (recipe.get("reward_funcs") or []):
            assert recipe["derivation_pattern"] == PLAN_PATTERN
            assert recipe["self_check_pattern"] == CHECK_BY_EXAMPLE_PATTERN


@pytest.mark.parametrize(
    ("text", "checks"),
    [
        ("```python\nprint(1)\n```", None),
        ("The idea is to sort.\n```python\nx = 1\n```", 0),
        ("1. Read n.\n2. Print it.", 0),
        ("We can sort. Let me test it with [2, 1]: it gives [1, 2]. Edge cases: an empty list.", 2),
        ("First, sort. For the input 3 it prints 9.", 1),
        ("My plan: sort. Wait, duplicates. Let's trace n = 2.", 2),
    ],
)
def test_what_these_behaviours_are(text, checks):
    assert count_self_checks(text, PLAN_PATTERN, CHECK_BY_EXAMPLE_PATTERN) == checks
