"""DAPO's dynamic sampling: a prompt whose completions all earn the same teaches nothing, so another takes its place.

Prompts come from an endless stream. Round after round, the completions of the next prompts are sampled and scored,
until enough groups are mixed (their deciding reward differs within the group) to fill a generation batch. The batch
is made of the first mixed groups of the stream, in its order, whatever the size of the rounds and the number of
processes. All processes decide alike, since they see the rewards of all.

Prompts that will most likely not be mixed can be left out of the stream before they are sampled: by the rule of
`prompt_history.py`, a number drawn for each position, and visits up to the last group of the batch before. What the
rule reads depends neither on the size of the rounds nor on the number of processes, and so the batch does not.

Source: DAPO (https://arxiv.org/abs/2503.14476), section 3.2. Nothing here knows a trainer.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fipo_trl.trainer.prompt_history import PromptHistory


MIXED = 1e-6  # a group is mixed if its deciding reward spreads by more; floats of equal rewards may differ by less
LARGEST_ROUND = 4.0  # generation batches: the most that "auto" samples in one round, and the paper's fixed factor
MEMORY = 0.5  # of the keep rate, per generation: it drifts as the policy learns

logger = logging.getLogger(__name__)


class Group(NamedTuple):
    """The completions of one prompt."""

    position: int  # of the prompt in the stream
    rewards: Tensor  # (G, F), by reward function, NaN where it gave none
    rollouts: dict[int, Any]  # those that this process sampled, by their number in the group


class Batch(NamedTuple):
    """What a generation is trained on, and what it took to find it. All counts are of groups."""

    groups: list[Group]
    fillers: int  # groups at the end that are not mixed, because the rounds ran out
    carried_over: int  # groups at the beginning that were sampled for the batch before
    rounds: int
    generated: int
    all_right: int  # of those generated: not mixed, deciding reward above 0
    all_wrong: int  # of those generated: not mixed, deciding reward 0 or less, or none
    surplus: int  # mixed groups found beyond those that the batch needed
    mean_reward: float  # deciding reward of all that was generated; NaN if nothing was
    skipping: dict[str, float]  # what the rule that skips prompts did, by metric; empty without one

    def metrics(self) -> dict[str, float]:
        """What is logged under `dynamic_sampling/`."""
        values: dict[str, float] = {
            "rounds": self.rounds,
            "generated": self.generated,
            "kept": len(self.groups) - self.fillers,
            "surplus": self.surplus,
            "carried_over": self.carried_over,
            **self.skipping,
        }
        if self.generated:
            values |= {
                "all_right_fraction": self.all_right / self.generated,
                "all_wrong_fraction": self.all_wrong / self.generated,
                "reward": self.mean_reward,
            }
        return values


class PromptStream:
    """The rows of a dataset without end, each epoch in another order (or in their own). Indexed by position.

    Each position has a random number, too. Both depend on the seed and the position only.
    """

    def __init__(self, rows: int, seed: int, shuffle: bool = True):
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self._epoch = -1
        self._order: list[int] = []  # of the rows in that epoch
        self._draws: list[float] = []

    def __getitem__(self, position: int) -> int:
        place = self._enter_epoch(position)
        return self._order[place] if self.shuffle else place

    def draw(self, position: int) -> float:
        """Uniform in [0, 1)."""
        place = self._enter_epoch(position)
        return self._draws[place]

    def _enter_epoch(self, position: int) -> int:
        """Draw what an epoch needs, unless it was the last one asked for. The place of a position in its epoch."""
        epoch, place = divmod(position, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.rows, generator=generator).tolist()
            self._draws = torch.rand(self.rows, generator=generator, dtype=torch.float64).tolist()
        return place


class DynamicSampler:
    """Fills generation batches with mixed groups.

    Args:
        stream: Where prompts come from.
        size: Groups in a batch.
        deciding: Number of the reward function whose values decide.
        oversample: Prompts of a round, in batches. `"auto"` sizes each round by what is missing and by the keep rate
            seen so far, one standard deviation above the mean: five rounds out of six then fill the batch.
        max_rounds: After so many the batch is filled up with groups that are not mixed.
        carry_over: Whether surplus mixed groups come first in the next batch, and are dropped if that has no place for
            them. Otherwise the stream goes back to the first prompt that was not used.
        strict: Whether running out of rounds is an error.
        multiple: Rounds are multiples of so many prompts, lest processes get unequal shares.
        skip: Whether prompts that will most likely not be mixed are passed over.
    """

    def __init__(
        self,
        stream: PromptStream,
        size: int,
        *,
        deciding: int = 0,
        oversample: float | str = "auto",
        max_rounds: int = 10,
        carry_over: bool = False,
        strict: bool = False,
        multiple: int = 1,
        skip: bool = False,
    ):
        self.stream, self.size, self.deciding, self.oversample = stream, size, deciding, oversample
        self.max_rounds, self.carry_over, self.strict, self.multiple = max_rounds, carry_over, strict, multiple
        self.history = PromptHistory(stream.rows) if skip else None
        self.position = 0  # of the next prompt in the stream
        self.pool: list[Group] = []  # carried over to the next batch
        self.mixed_seen = self.seen = 0.0  # groups, the older the less they count

    def fill(self, roll_out: Callable[[list[int]], tuple[Tensor, list[dict[int, Any]]]]) -> Batch:
        """The next batch.

        Args:
            roll_out: Samples and scores completions of the dataset rows that it is given. Returns the rewards of all
                processes, (prompts, G, F), and for each prompt the rollouts of this process.

        Raises:
            RuntimeError: if the rounds run out and `strict` is set.
        """
        mixed, self.pool = self.pool[: self.size], []
        carried_over = len(mixed)
        others: list[Group] = []
        scores: list[Tensor] = []
        visits: list[tuple[int, int, int | None]] = []  # position, row and outcome, as `PromptHistory.record` takes it
        sampled = {self.stream[group.position] for group in mixed}
        start = self.position
        rounds = generated = all_right = all_wrong = 0
        self.mixed_seen, self.seen = MEMORY * self.mixed_seen, MEMORY * self.seen
        while len(mixed) < self.size and rounds < self.max_rounds:
            prompts = self.round_size(self.size - len(mixed))
            positions = self._next_positions(prompts, sampled)
            rows = [self.stream[position] for position in positions]
            rewards, rollouts = roll_out(rows)
            rounds, generated = rounds + 1, generated + prompts
            deciding = rewards[:, :, self.deciding]
            scores.append(deciding)
            is_mixed = spread(deciding) > MIXED
            is_right = ~is_mixed & (deciding.nanmean(dim=1) > 0)
            is_wrong = ~is_mixed & ~is_right
            all_right += int(is_right.sum())
            all_wrong += int(is_wrong.sum())
            scored = ~deciding.isnan().all(dim=1)
            outcomes = [
                int(right) - int(wrong) if known else None
                for right, wrong, known in zip(is_right, is_wrong, scored, strict=True)
            ]
            visits += zip(positions, rows, outcomes, strict=True)
            for group, keep in zip(map(Group, positions, rewards, rollouts), is_mixed.tolist(), strict=True):
                if keep:
                    mixed.append(group)
                elif len(others) < self.size:
                    others.append(group)
            self.mixed_seen, self.seen = self.mixed_seen + int(is_mixed.sum()), self.seen + prompts
            logger.info(f"Dynamic sampling: {len(mixed)} of {self.size} groups after {rounds} rounds.")

        found = len(mixed)
        surplus, missing = mixed[self.size :], self.size - found
        if missing > 0:
            self._explain_shortage(found, rounds, generated)
        elif self.carry_over:
            self.pool = surplus
        elif rounds:
            self.position = mixed[self.size - 1].position + 1
        return Batch(
            groups=mixed[: self.size] + others[: max(missing, 0)],
            fillers=max(missing, 0),
            carried_over=carried_over,
            rounds=rounds,
            generated=generated,
            all_right=all_right,
            all_wrong=all_wrong,
            surplus=len(surplus),
            mean_reward=torch.cat(scores).nanmean().item() if scores else math.nan,
            skipping=self._record(self.history, start, visits) if self.history else {},
        )

    def _next_positions(self, prompts: int, sampled: set[int]) -> list[int]:
        """Go past the next prompts of the stream that are not skipped.

        Where most are, a generation may pass the data several times. What the history says of a prompt does not change
        in it, so none is sampled again before all others have been.

        Args:
            prompts: How many.
            sampled: Rows that were sampled in this generation. Added to.
        """
        positions: list[int] = []
        while len(positions) < prompts:
            row = self.stream[self.position]
            if self.history is None:
                positions.append(self.position)
            elif row not in sampled and self.stream.draw(self.position) < self.history.probability(row):
                positions.append(self.position)
                sampled.add(row)
                if len(sampled) == self.stream.rows:
                    sampled.clear()
            self.position += 1
        return positions

    def _record(
        self, history: PromptHistory, start: int, visits: list[tuple[int, int, int | None]]
    ) -> dict[str, float]:
        """Let the history know of a generation that began at `start`. Visits that will be made again do not count.

        Returns:
            The metrics of skipping; the probabilities are those that the generation went by.
        """
        passed = [(row, outcome) for position, row, outcome in visits if position < self.position]
        probabilities = {"p_easy": history.p_easy, "p_hard": history.p_hard}
        first_epoch = start < self.stream.rows
        revived = history.record(passed, follow_target=not first_epoch)
        return {"skipped": self.position - start - len(passed), "revived": revived, **probabilities}

    def round_size(self, missing: int) -> int:
        """Prompts of the next round, if so many groups are missing."""
        if self.oversample == "auto":
            keep_rate = (self.mixed_seen + 1) / (self.seen + 1)
            prompts = (missing + math.sqrt(missing * (1 - keep_rate))) / keep_rate
            prompts = max(missing, min(prompts, LARGEST_ROUND * self.size))
        else:
            prompts = float(self.oversample) * self.size
        return math.ceil(prompts / self.multiple) * self.multiple

    def _explain_shortage(self, found: int, rounds: int, generated: int):
        message = (
            f"Dynamic sampling found {found} of {self.size} groups with a spread of reward: {rounds} rounds "
            f"(dynamic_sampling_max_rounds={self.max_rounds}) sampled {generated} prompts. "
        )
        if self.strict:
            raise RuntimeError(message + "Give other prompts, or set dynamic_sampling_strict=False to go on.")
        logger.warning(message + "Groups without a spread fill the batch; their advantages are 0.")

    def state_dict(self) -> dict:
        """All that the next batches depend on, beside the policy. Rollouts in the pool are those of this process."""
        return {
            "rows": self.stream.rows,
            "position": self.position,
            "mixed_seen": self.mixed_seen,
            "seen": self.seen,
            "pool": [group._asdict() for group in self.pool],
            "history": self.history.state_dict() if self.history else None,
        }

    def load_state_dict(self, state: dict):
        self.position, self.mixed_seen, self.seen = state["position"], state["mixed_seen"], state["seen"]
        self.pool = [Group(**group) for group in state["pool"]]
        if self.history and state.get("history"):
            self.history.load_state_dict(state["history"])


def spread(rewards: Tensor) -> Tensor:
    """Largest minus smallest reward of each group, (N, G) -> (N,). NaN (unscored) is left out."""
    return rewards.nan_to_num(-math.inf).amax(dim=1) - rewards.nan_to_num(math.inf).amin(dim=1)
