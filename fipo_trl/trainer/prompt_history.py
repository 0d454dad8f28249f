"""GRESO: a prompt that has taught nothing lately is most likely not sampled.

A prompt whose completions were all right, or all wrong, will most likely be so again at its next visit. It is sampled
with a probability p^z, where z is the number of its latest visits in a row that were so. Prompts that were all right
have one p and those that were all wrong another. Both follow a target: how many of the prompts sampled shall be so.
No prompt is given up for good.

Source: GRESO (https://arxiv.org/abs/2506.02177). Names and values are those of its code, commit b277843 of
github.com/Infini-AI-Lab/GRESO: `presampling_selector.py`, `ray_trainer.py` and the script of its 7B run. Nothing here
knows a trainer.
"""

from collections.abc import Iterable

import torch


P_START = 0.5  # p_easy, p_hard
P_STEP = 0.01  # by which they follow their targets, per generation
P_MIN, P_MAX = 0.05, 0.95  # min_p, max_p
LEAST = 0.01  # probability with which any prompt is sampled
TARGET = 0.25  # target_zero_variance: share of the prompts sampled that shall teach nothing
TARGET_EASY, TARGET_HARD = TARGET / 3, TARGET * 2 / 3  # hard prompts are the likelier to change: the policy learns


class PromptHistory:
    """What the latest visits to each prompt have shown.

    Args:
        rows: Prompts in the dataset, by which they are known.
    """

    def __init__(self, rows: int):
        # Latest visits in a row that were all right (above 0) or all wrong (below). 0: mixed, or never visited
        self.streaks = torch.zeros(rows, dtype=torch.int32)
        self.p_easy = self.p_hard = P_START

    def probability(self, row: int) -> float:
        """With which the prompt of a row is sampled."""
        streak = int(self.streaks[row])
        p = self.p_easy if streak > 0 else self.p_hard
        return max(p ** abs(streak), LEAST)

    def record(self, visits: Iterable[tuple[int, int | None]], follow_target: bool) -> int:
        """Add the visits of a generation.

        Args:
            visits: (row, outcome), in order. Outcomes: 1, all right; -1, all wrong; 0, mixed; `None`, not
                scored, which tells nothing.
            follow_target: Whether p_easy and p_hard take a step.

        Returns:
            How many prompts had a streak and were mixed now.
        """
        outcomes, revived = [], 0
        for row, outcome in visits:
            if outcome is None:
                continue
            streak = int(self.streaks[row])
            revived += outcome == 0 != streak
            self.streaks[row] = streak + outcome if streak * outcome > 0 else outcome
            outcomes.append(outcome)
        if follow_target and outcomes:
            self.p_easy = step(self.p_easy, outcomes.count(1) / len(outcomes), TARGET_EASY)
            self.p_hard = step(self.p_hard, outcomes.count(-1) / len(outcomes), TARGET_HARD)
        return revived

    def state_dict(self) -> dict:
        return {"streaks": self.streaks, "p_easy": self.p_easy, "p_hard": self.p_hard}

    def load_state_dict(self, state: dict):
        self.streaks, self.p_easy, self.p_hard = state["streaks"].clone(), state["p_easy"], state["p_hard"]


def step(p: float, share: float, target: float) -> float:
    """`p`, a step lower if the share of prompts sampled that were so has reached its target, else a step higher."""
    return max(p - P_STEP, P_MIN) if share >= target else min(p + P_STEP, P_MAX)
