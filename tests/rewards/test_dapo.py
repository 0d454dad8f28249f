"""DAPO's rewards: equal to the public scorer, and unmoved by whatever a model may write."""

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fipo_trl.rewards.dapo import (
    NO_ANSWER,
    dapo_accuracy,
    dapo_reward,
    normalize_answer,
    overlong_penalty,
    predicted_answer,
)


CASES = json.loads((Path(__file__).parents[1] / "golden" / "dapo_reward.json").read_text())
LONG = 100_000  # characters


def test_equals_the_public_scorer():
    completions = [case["completion"] for case in CASES]
    solutions = [case["ground_truth"] for case in CASES]
    assert dapo_reward(completions, solutions) == [case["score"] for case in CASES]
    assert dapo_accuracy(completions, solutions) == [(case["score"] + 1) / 2 for case in CASES]
    assert [predicted_answer(completion) for completion in completions] == [case["pred"] for case in CASES]
    chats = [[{"role": "assistant", "content": completion}] for completion in completions]
    assert dapo_reward(completions=chats, solution=solutions, prompts=None) == [case["score"] for case in CASES]


@pytest.mark.parametrize(
    ("answer", "expected"),  # computed with the public scorer
    [
        (r"x = \frac12", r"\frac{1}{2}"),
        (r"\frac123", r"\frac{1}{2}3"),
        (r"\frac{12}{3}", r"\frac{12}{3}"),
        (r"\sqrt2x", r"\sqrt{2}x"),
        (r"so $1$ or $2$", "1"),
        (r"5.$", "5"),
        (r"\$5", "5"),
        (r"5\ \mathrm{cm}", r"5\mathrm{}"),
        (r"5 \text{ km}", "5"),
        (r"5 \mbox{ and } 6", "56"),
        (r"x,\text{and}y", "x,y"),
        (r"5\text{m}^2", "5"),
        (r"\text{\textbf{B}}", "B"),
        (r"\overline{AB}", "AB"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{1} and \boxed{2}", r"1}and\boxed{2"),
        ("1,234", "1234"),
        ("1,23x", "1,23x"),
        ("12{,}345", "12345"),
        ("a dog", "dog"),
        ("an apple", "apple"),
        ("7 square ways integers dollars mph inches hours km units points feet minutes digits cents degrees cm", "7"),
        ("7 gm pounds meters meals edges students children tickets multiples sue", "7"),
        ('7\\text{s}\\text{.}\\mathrm{th}^\\circ"\\ldots', "7"),
        (r"7\text{m}^3", "7"),
        ("7\\text{\n}", "7"),
        (r"1 \dots", "1"),
        (r"90^{\circ}", "90"),
        (r"3\;4,\!5", "345"),
        ("3\\text{\ns}", "3"),
        ("", ""),
        ("\\text{", "\\text{"),
        ("sqrt", "sqrt"),
        ("sqrt$1$", "1"),
        (r"\text\textbf{{B}}", r"\text{B}"),  # each command once, in order
        (r"\text\text{}{B}", "B"),
        ("\t7\t", "7"),
    ],
)
def test_normal_form(answer, expected):
    assert normalize_answer(answer) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Answer:\n\n 7\nmore", "7"),  # white space before the answer may hold line ends
        ("Answer: 7 Answer: 8", "7Answer:8"),  # the last match, and a match takes the rest of its line
        ("Answer: 7\nAnswer:", "7"),
        ("Answer 7", NO_ANSWER),
        ("answers: 7", NO_ANSWER),
        ("my ANSWER : 7", "7"),
        ("Answer: 7" + "x" * 299, NO_ANSWER),  # the marker must lie within the last 300 characters
        ("Answer: 7" + "\n" * 291, "7"),
        ("Answer: 7" + "\n" * 292, NO_ANSWER),
    ],
)
def test_predicted_answer(completion, expected):
    assert predicted_answer(completion) == expected


def test_the_last_message_of_a_chat_is_scored():
    said = {"role": "assistant", "content": "Answer: 1"}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Answer"}, {"type": "text", "text": ": 1"}]}
    called = {"role": "assistant", "content": None, "tool_calls": []}
    chats = [[said], [called, said], [parts], [said, called], [], [{"role": "assistant"}], [{"content": [{}]}]]
    assert dapo_reward(chats, ["1"] * len(chats)) == [1, 1, 1, -1, -1, -1, -1]


def test_the_solution_is_normalised_too():
    assert dapo_reward(["Answer: 1,000"] * 3, ["1000", "n = 1,000 units", "1000.0"]) == [1, 1, -1]


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters() | st.sampled_from("Answer: $\\{}=\n\0,")), st.text())
def test_any_text_gets_a_reward(text, solution):
    rewards = dapo_reward([text, "Answer: " + text, "Answer: " + solution], [solution] * 3)
    assert set(rewards) <= {1.0, -1.0}


BAIT = {
    "text": "\\text{",
    "boxed": "\\boxed{",
    "braces": "{",
    "dollars": "$",
    "answers": "Answer",
    "colons": "Answer:",
    "spaces": " ",
    "line ends": "\n",
    "frac": "frac",
    "NUL": "\0",
    "emoji": "\N{GRINNING FACE}",
    "surrogate": "\ud800",
    "letters": "a",
}


@pytest.mark.parametrize("bait", BAIT.values(), ids=BAIT.keys())
def test_time_is_bounded(bait):
    long = bait * (LONG // len(bait))
    completions = [long, long + "\nAnswer: 7", "Answer: " + long, "Answer:" + long[:291] + "$", "Answer" + long[:290]]
    start = time.process_time()
    rewards = dapo_reward(completions, ["7"] * len(completions))
    assert time.process_time() - start < 0.1  # measured: 0.003 s
    assert rewards[1] == 1


def test_overlong_penalty_is_the_papers():
    penalty = overlong_penalty(20480, 4096)
    lengths = [0, 1, 16384, 16385, 18432, 20479, 20480]
    expected = [0, 0, 0, -1 / 4096, -0.5, -4095 / 4096, -1]
    assert penalty(completion_ids=[[0] * length for length in lengths], prompts=None) == expected
    rng = random.Random(0)
    for _ in range(100):  # eq. 13 of DAPO, as verl computes it
        longest = rng.randint(1, 50)
        buffer = rng.randint(1, longest)
        lengths = range(longest + 1)
        expected = [min(-(length - (longest - buffer)) / buffer, 0) for length in lengths]
        assert overlong_penalty(longest, buffer)(completion_ids=[[0] * length for length in lengths]) == expected


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_overlong_buffer_is_checked(buffer):
    with pytest.raises(ValueError, match=f"buffer={buffer} must be at least 1 and at most max_completion_length=100"):
        overlong_penalty(100, buffer)


def test_solutions_are_checked():
    with pytest.raises(ValueError, match="2 completions but 1 solutions"):
        dapo_reward(["", ""], ["1"])
    with pytest.raises(ValueError, match=r"solution\[1\] is 7. Make the column 'solution' one of strings."):
        dapo_accuracy(["", ""], ["7", 7])
