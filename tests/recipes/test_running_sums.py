from random import Random

import make_tiny_base
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from recipes.tiny.running_sums import (
    ALPHABET,
    correct_answer,
    count_checks,
    exact_answer,
    exact_chain,
    kind_of_answer,
    make_problem,
    worked_answer,
)


CHAIN = "a3:3 b0:3 c4:2 "


@pytest.mark.parametrize(
    ("completion", "checks", "name"),
    [
        ("A:2", None, "no chain"),
        ("", None, "no chain"),
        ("?" + CHAIN + "A:2", None, "no chain"),
        (CHAIN + "A:2", 0, "one chain"),
        (CHAIN + "?A:2", 0, "one chain"),
        (CHAIN + "?" + CHAIN + "A:2", 1, "a check"),
        (CHAIN + "?" + CHAIN + "?" + CHAIN + "A:2", 2, "several checks"),
        (CHAIN + "?" * 50 + CHAIN, 1, "a check"),
    ],
)
def test_kind_of_answer(completion, checks, name):
    assert count_checks(completion) == checks
    assert kind_of_answer(completion) == name


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("A:2", 1.0),
        (CHAIN + "A:2", 1.0),
        ("A:1 A:2", 1.0),
        ("A:2 A:1", 0.0),
        ("A:2 ", 0.0),
        ("A:", 0.0),
        ("2", 0.0),
        ("", 0.0),
        ("A:7", 0.0),
        ("\0A:2" * 10_000, 1.0),
        ("A" * 100_000, 0.0),
        ("🙂", 0.0),
    ],
)
def test_reward(completion, reward):
    assert exact_answer(["a3b0c4="], [completion]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (CHAIN + "A:2", 1.0),
        ("a3:3 b0:4 c4:3 ?" + CHAIN + "A:2", 1.0),  # a slip, and then a walk without one
        (CHAIN + "?a3:3 b0:4 c4:3 A:2", 0.0),
        (CHAIN + "?A:2", 0.0),
        ("A:2", 0.0),
        (CHAIN + "A:1", 0.0),
        (CHAIN, 0.0),
        ("a3:3 c4:2 A:2", 0.0),  # right, but b was left out
        (CHAIN + "A:2 ", 0.0),
        ("", 0.0),
    ],
)
def test_stricter_reward(completion, reward):
    assert exact_chain(["a3b0c4="], [completion]) == [reward]


@given(completion=st.text())
def test_reward_and_behaviour_take_any_text(completion):
    assert exact_answer(["a3b0c4="], [completion]) in ([0.0], [1.0])
    kind_of_answer(completion)


@given(seed=st.integers(), max_walks=st.integers(0, 5))
def test_a_careful_teacher_is_right(seed, max_walks):
    rng = Random(seed)
    prompt = make_problem(rng, 1, 26)
    answer = worked_answer(rng, prompt, max_walks, slip=0.0)
    assert set(prompt + answer) <= set(ALPHABET)
    if max_walks:
        assert exact_answer([prompt], [answer]) == exact_chain([prompt], [answer]) == [1.0]
        assert count_checks(answer) == min(max_walks - 1, 1)  # two walks agree at once


def test_slips_cost_accuracy_and_checks_win_it_back():
    rng = Random(0)
    prompts = [make_problem(rng) for _ in range(2000)]
    accuracy = [
        sum(exact_answer(prompts, [worked_answer(rng, prompt, walks, slip=0.18) for prompt in prompts])) / len(prompts)
        for walks in range(4)
    ]
    assert accuracy[0] == pytest.approx(0.2, abs=0.03)  # a guess among five
    assert accuracy[0] + 0.1 < accuracy[1] < accuracy[2] - 0.1 < accuracy[3]


def test_bad_arguments():
    with pytest.raises(ValueError, match="1 <= min_digits <= max_digits <= 26, got 3 and 2"):
        make_problem(Random(0), 3, 2)
    with pytest.raises(ValueError, match="not a running-sum problem: 'a5='"):
        correct_answer("a5=")
    with pytest.raises(ValueError, match=r"got -1 and 0\.0"):
        worked_answer(Random(0), "a1=", -1)
    with pytest.raises(ValueError, match=r"got 1 and 1\.5"):
        worked_answer(Random(0), "a1=", 1, slip=1.5)


@pytest.mark.parametrize(("folder", "digits"), [("tiny", (4, 6)), ("tiny/study", (7, 9))])
def test_shipped_data_and_tokenizer_are_what_the_script_writes(tmp_path, folder, digits):
    shipped = ROOT / "recipes" / folder
    make_tiny_base.write_data(Random(0), tmp_path, *digits)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (shipped / "data" / name).read_bytes()
    make_tiny_base.make_tokenizer(ALPHABET, 256).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (shipped / "base" / name).read_text()


def test_problems_of_many_lengths_are_what_the_script_writes(tmp_path, monkeypatch):
    words = "make_tiny_base.py --data_only --train_rows 530 --min_digits 3 --max_digits 12 --output"
    monkeypatch.setattr("sys.argv", [*words.split(), str(tmp_path)])
    make_tiny_base.main()
    assert not (tmp_path / "base").exists()
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "data" / name).read_bytes() == (ROOT / "recipes/tiny/skip/data" / name).read_bytes()


def test_tokenizer_has_one_token_per_character():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "tiny" / "base")
    ids = tokenizer.encode(ALPHABET)
    assert ids == list(range(2, len(tokenizer)))
    assert tokenizer.decode(ids) == ALPHABET
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
