from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.calibrated.task import ALPHABET, decisive_tokens, kind_of_answer, worked_answer
from recipes.tiny.running_sums import correct_answer, exact_answer, make_problem


PROMPT = "a3b0c4="  # 3, 3, 2


@pytest.mark.parametrize(
    ("completion", "decisive"),
    [
        ("a3:3 b0=3,c4>2 A:2", "   ^    ^    ^    "),  # right: each sum
        ("a3:3 b0=4,c4>3 A:3", "        ^         "),  # wrong: the slip
        ("a3:3 b0=3,c4>2 A:1", "                 ^"),  # wrong, though the walk is right: the answer
        ("a3:3 b1=3,c4>2 A:2", "                  "),  # a lucky answer
        ("a3:3 b1=4,c4>3 A:3", "     ^            "),  # the wrong digit
        ("a3:3 c4>2 A:2", "             "),  # a step left out, and lucky
        ("a3:3 c4>2 A:3", "     ^       "),
        ("a3:3 b0=4,c4>3 ?a3=3 b0>3,c4:2 A:2", "               ^   ^    ^    ^    "),  # mended
        ("a3:3 b0=3,c4>2 ?a3=3 b0>3,c4:2 A:2", "                   ^    ^    ^    "),  # nothing to mend
        ("a3:3 b0=3,c4>2 ?a3=3 b0>2,c4:1 A:1", "                        ^         "),  # the last walk counts
        ("a3:3 b0=3,c4>2 ", "              ^"),  # no answer
        ("a3:3 b0", "     ^ "),
        ("", ""),
        ("?", "^"),
        ("A:3", "^  "),
    ],
)
def test_decisive_tokens(completion, decisive):
    assert "".join(" ^"[flag] for flag in decisive_tokens(PROMPT, completion)) == decisive


@given(st.text(ALPHABET, max_size=40))
def test_no_completion_makes_it_raise(completion):
    assert len(decisive_tokens(PROMPT, completion)) == len(completion)


def test_teacher():
    rng = Random(0)
    prompt = make_problem(rng, 15, 17)
    clean = worked_answer(rng, prompt, max_walks=4, slip=0.0)
    assert exact_answer([prompt], [clean]) == [1.0]
    assert kind_of_answer(clean) == "a check"  # two walks that end alike
    assert set(":=> ,") <= set(clean) <= set(ALPHABET)
    assert sum(decisive_tokens(prompt, clean)) == prompt.count("=") * (len(prompt) // 2)
    slipped = [worked_answer(rng, prompt, max_walks=1, slip=1.0) for _ in range(20)]
    assert {kind_of_answer(answer) for answer in slipped} == {"one chain"}
    wrong = [answer for answer in slipped if answer[-1] != correct_answer(prompt)]
    assert len(wrong) > 10
    assert all(sum(decisive_tokens(prompt, answer)) == 1 for answer in wrong)
