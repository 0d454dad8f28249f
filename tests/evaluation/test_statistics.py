"""The metrics equal what comes out when everything that could be drawn is written out."""

from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_for_tests import needs_column

from fipo_trl import rewards
from fipo_trl.evaluation.scoring import answers_beside, score
from fipo_trl.evaluation.statistics import (
    bootstrap,
    consensus,
    paired_bootstrap,
    pass_at_k,
    per_problem,
    quartiles,
)
from fipo_trl.rewards.dapo import NO_ANSWER
from recipes.tiny import running_sums


def share_of_subsets_with_a_right_one(n, correct, k):
    completions = [True] * correct + [False] * (n - correct)
    subsets = list(combinations(completions, k))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_pass_at_k_equals_the_share_of_all_subsets(n):
    for correct, k in product(range(n + 1), range(1, n + 1)):
        assert pass_at_k(n, correct, k) == float(share_of_subsets_with_a_right_one(n, correct, k))


def test_pass_at_k_of_many_completions():
    n, correct, k = 100_000, 7, 1_000
    expected = Fraction(1)
    for i in range(k):  # the chance that none of k is right, draw by draw
        expected *= Fraction(n - correct - i, n - i)
    assert pass_at_k(n, correct, k) == pytest.approx(float(1 - expected), rel=1e-15)
    assert pass_at_k(n, n, n) == 1.0
    assert pass_at_k(10**6, 1, 1) == 1e-6  # 1 - (1 - 1e-6) would have lost half its digits


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_what_cannot_be(n, correct, k):
    with pytest.raises(ValueError, match=f"n={n}, correct={correct}, k={k}"):
        pass_at_k(n, correct, k)


def mean_over_tie_breaks(answers, solution):
    """Every answer that no other has more votes than wins once."""
    winners = {a for a in answers if all(answers.count(a) >= answers.count(b) for b in answers)}
    return sum(winner == solution for winner in winners) / len(winners)


@given(st.lists(st.sampled_from(["0", "1", "2", None]), min_size=1, max_size=9))
def test_consensus_equals_the_mean_over_all_tie_breaks(answers):
    correct = [answer == "1" for answer in answers]
    assert consensus(answers, correct) == pytest.approx(mean_over_tie_breaks(answers, "1"), abs=1e-15)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7"], [True], 1.0),
        (["7", "8"], [True, False], 0.5),
        (["7", "8", "9"], [True, False, False], 1 / 3),
        (["7", "8", "8"], [True, False, False], 0.0),
        (["7", "7", "8", "8", "9"], [True, True, False, False, False], 0.5),
        (
            [NO_ANSWER, rewards.dapo.NO_ANSWER, "7"],
            [False, False, True],
            0.0,
        ),  # those without an answer vote, too
        (["1/2", "1/2", "0.5"], [True, False, False], 0.5),  # the verifier is of two minds about one answer
    ],
)
def test_consensus_by_hand(answers, correct, expected):
    assert consensus(answers, correct) == pytest.approx(expected)


@pytest.mark.parametrize(("answers", "correct"), [([], []), (["7"], [True, False])])
def test_consensus_refuses_what_cannot_be(answers, correct):
    with pytest.raises(ValueError, match=f"got {len(answers)} and {len(correct)}"):
        consensus(answers, correct)


CORRECT = [[True, True, False, False], [False, False, False, True], [False] * 4]
ANSWERS = [["5", "5", "6", "7"], ["1", "1", "2", "3"], ["4", None, "4", None]]
LENGTHS = [[10, 20, 30, 40], [1, 1, 1, 1], [5, 6, 7, 8]]
TRUNCATED = [[False, False, False, True], [False] * 4, [True] * 4]


def test_per_problem():
    metrics = per_problem(CORRECT, ANSWERS, LENGTHS, TRUNCATED)
    assert list(metrics) == ["avg@4", "cons@4", "pass@1", "pass@2", "pass@3", "pass@4", "mean_length", "truncated"]
    assert metrics["avg@4"].tolist() == metrics["pass@1"].tolist() == [0.5, 0.25, 0.0]
    assert metrics["cons@4"].tolist() == [1.0, 0.0, 0.0]
    assert metrics["pass@2"].tolist() == [5 / 6, 1 / 2, 0.0]
    assert metrics["pass@4"].tolist() == [1.0, 1.0, 0.0]
    assert metrics["mean_length"].tolist() == [25.0, 1.0, 6.5]
    assert metrics["truncated"].tolist() == [0.25, 0.0, 1.0]
    assert "cons@4" not in per_problem(CORRECT, None, LENGTHS, TRUNCATED)
    assert quartiles(LENGTHS) == [1.0, 6.5, 12.5]  # of 1 1 1 1 5 6 7 8 10 20 30 40


@pytest.mark.parametrize("correct", [[], [[]], [[True], [True, False]], [[True, False]] * 3])
def test_per_problem_refuses_ragged_samples(correct):
    with pytest.raises(ValueError, match="as many completions as the others"):
        per_problem(correct, None, [[1]] * len(correct), [[False]] * len(correct))


def test_bootstrap_equals_the_distribution_over_all_draws():
    values = np.array([0.0, 0.25, 0.5, 1.0])
    draws = [np.mean(draw) for draw in product(values, repeat=4)]  # all 256, equally likely
    value, low, high = bootstrap({"avg": values}, resamples=20_000)["avg"]
    assert value == values.mean()
    assert low == np.quantile(draws, 0.025, method="inverted_cdf")
    assert high == np.quantile(draws, 0.975, method="inverted_cdf")


def test_bootstrap_follows_its_seed_and_keeps_metrics_together():
    values = {"a": np.linspace(0, 1, 30), "b": np.linspace(0, 2, 30), "c": np.ones(30)}
    intervals = bootstrap(values, resamples=500, seed=1)
    assert bootstrap(values, resamples=500, seed=1) == intervals
    assert bootstrap(values, resamples=500, seed=2) != intervals
    assert intervals["b"] == pytest.approx([2 * number for number in intervals["a"]])
    assert intervals["c"] == (1.0, 1.0, 1.0)


def test_intervals_hold_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        chances = generator.beta(0.5, 0.5, size=30)  # hard and easy problems; the mean over all such is 0.5
        _, low, high = bootstrap({"avg": generator.binomial(32, chances) / 32}, resamples=400, seed=seed)["avg"]
        held += low <= 0.5 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_paired_bootstrap_knows_that_the_problems_are_the_same():
    generator = np.random.default_rng(0)
    a = {"avg": generator.random(30), "only_a": np.ones(30)}
    b = {"avg": a["avg"] + generator.normal(0.05, 0.02, size=30)}
    difference = paired_bootstrap(a, b)
    assert list(difference) == ["avg"]
    assert difference["avg"].value == pytest.approx((b["avg"] - a["avg"]).mean())
    assert 0.03 < difference["avg"].low < difference["avg"].value < difference["avg"].high < 0.07
    assert bootstrap(a)["avg"].high > bootstrap(b)["avg"].low  # two separate intervals overlap


def test_answers_come_from_the_module_of_the_reward_function():
    assert answers_beside(rewards.dapo_accuracy) is rewards.predicted_answer
    assert answers_beside(running_sums.exact_answer) is running_sums.predicted_answer
    assert answers_beside(needs_column) is None
    assert running_sums.predicted_answer("a3:3 A:4 A:2") == "2"
    assert running_sums.predicted_answer("a3:3 A:") == ""
    assert running_sums.predicted_answer("a3:3") is None


def test_score():
    texts = ["Answer: 07", "Answer: $7$", "seven"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, chats):
        correct, answers = score(rewards.dapo_accuracy, ["?"] * 3, completions, solution=["7"] * 3)
        assert correct == [False, True, False]
        assert answers == ["07", "7", NO_ANSWER]
    assert score(needs_column, ["?"] * 2, ["", ""], level=["1", "0"]) == ([True, False], None)
    with pytest.raises(ValueError, match=r"dapo_reward gave \[-1.0, 1.0, -1.0\].*1 \(right\) or 0 \(wrong\)"):
        score(rewards.dapo_reward, ["?"] * 3, texts, solution=["7"] * 3)
    with pytest.raises(ValueError, match=r"gave \[None\]"):
        score(lambda **kwargs: [None], ["?"], ["A"])
