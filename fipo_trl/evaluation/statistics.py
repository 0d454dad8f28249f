"""How good a model is, from the answers that it sampled: avg@n, cons@n, pass@k, with 95% intervals.

Notation: `P` problems, `n` completions of each. Each completion is right or wrong (`correct`) and gives an answer.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np


RESAMPLES = 10_000  # of the bootstrap: the ends of an interval move by about a hundredth of its width between seeds


class Interval(NamedTuple):
    """A mean over problems, and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of `k` completions is right, if they are drawn without replacement from `n` of
    which `correct` are: the unbiased estimate of pass@k.

        1 - C(n - correct, k) / C(n, k)

    It is computed in whole numbers and rounded once, so that no `n` overflows or cancels.

    Raises:
        ValueError: unless `0 <= correct <= n` and `1 <= k <= n`.

    Source: https://arxiv.org/abs/2107.03374, eq. 1.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}")
    return (comb(n, k) - comb(n - correct, k)) / comb(n, k)


def consensus(answers: Sequence[Hashable], correct: Sequence[bool]) -> float:
    """Probability that the most frequent answer of a problem is right (one problem's share of cons@n).

    A tie is broken at random, so the probability is a mean: over the completions that gave one of the tied answers.
    Completions without an answer (whatever the caller calls them) vote as one answer, which is never right.

    Args:
        answers: One per completion, normalised: answers that mean the same must be equal.
        correct: Whether each completion is right. If completions of one answer differ in it, the answer counts as
            right in proportion.

    Raises:
        ValueError: if there is no completion, or not one answer for each.
    """
    if not answers or len(answers) != len(correct):
        raise ValueError(f"need one answer per completion and at least one, got {len(answers)} and {len(correct)}")
    votes = Counter(answers)
    most = max(votes.values())
    tied = [right for answer, right in zip(answers, correct, strict=True) if votes[answer] == most]
    return sum(tied) / len(tied)  # tied answers have equally many completions: this is the mean over the answers


def per_problem(
    correct: Sequence[Sequence[bool]],
    answers: Sequence[Sequence[Hashable]] | None,
    lengths: Sequence[Sequence[int]],
    truncated: Sequence[Sequence[bool]],
) -> dict[str, np.ndarray]:
    """Every metric as one number per problem, whose mean over the problems is the metric.

    Args:
        correct: (P, n), whether a completion is right.
        answers: (P, n), the normalised answers, or `None` where nothing tells them: then there is no cons@n.
        lengths: (P, n), in tokens.
        truncated: (P, n), whether a completion was cut off before it ended.

    Returns:
        `avg@n`, `cons@n`, `pass@1` to `pass@n`, `mean_length` (tokens), `truncated`: each (P,).

    Raises:
        ValueError: if there is no problem, or the problems do not have equally many completions, at least one.
    """
    sizes = {len(row) for rows in (correct, answers, lengths, truncated) if rows is not None for row in rows}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"every problem needs as many completions as the others, and at least 1; got {sorted(sizes)}")
    n = sizes.pop()
    right = [sum(map(bool, row)) for row in correct]
    metrics = {f"avg@{n}": [count / n for count in right]}
    if answers is not None:
        metrics[f"cons@{n}"] = [consensus(*row) for row in zip(answers, correct, strict=True)]
    for k in range(1, n + 1):
        metrics[f"pass@{k}"] = [pass_at_k(n, count, k) for count in right]
    metrics["mean_length"] = [sum(row) / n for row in lengths]
    metrics["truncated"] = [sum(map(bool, row)) / n for row in truncated]
    return {name: np.array(values, dtype=np.float64) for name, values in metrics.items()}


def bootstrap(values: dict[str, np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Means over problems with 95% intervals: percentiles over `resamples` draws of P problems with replacement.

    The problems are what is drawn, because they are few (30 in AIME) and differ most. That their n completions are
    samples, too, is part of how much the problems differ. All metrics see the same draws. Where a metric is the same
    for every problem, as when all are solved, the interval shrinks to that number, and is too short.

    Args:
        values: `{metric: (P,)}`, as [`per_problem`] gives them.
    """
    table = np.stack(list(values.values()), axis=1)  # (P, metrics)
    problems = len(table)
    generator = np.random.default_rng(seed)
    equal = np.full(problems, 1 / problems)
    means = np.stack([generator.multinomial(problems, equal) @ table for _ in range(resamples)]) / problems
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    columns = zip(values, table.mean(axis=0).tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: Interval(*numbers) for name, *numbers in columns}


def paired_bootstrap(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """The differences b - a of the metrics that both have, on the same problems, with 95% intervals.

    What makes a problem hard is common to both and drops out, so this tells more than two separate intervals.
    """
    return bootstrap({name: b[name] - a[name] for name in a if name in b}, resamples, seed)


def quartiles(lengths: Sequence[Sequence[int]]) -> list[float]:
    """The quartiles of all lengths, (P, n): a quarter, half and three quarters of them are at most so long."""
    return np.quantile(np.concatenate([np.asarray(row) for row in lengths]), [0.25, 0.5, 0.75]).tolist()
