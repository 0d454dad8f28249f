"""The computation of a loss, seen from the log-probability method that it calls.

`GRPOTrainer._compute_loss` first asks `_get_per_token_logps_and_entropies` for the log-probabilities of the policy.
Only then does it read `inputs["advantages"]`. So whoever computes the first can still change the second, if it knows
the inputs. A scope makes them known, and collects what was seen of the policy in the micro-batches of an update.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fipo_trl.objective.influence import InfluenceStatistics, PolicyStatistics


class LossScope:
    """At most one loss is computed at a time; `inputs` are `None` outside of it."""

    def __init__(self):
        self.inputs: Any = None  # a dict, inside of a loss
        self.statistics: list[Any] = []  # of the micro-batches of this update, what `_weight_advantages` gave

    @contextmanager
    def open(self, inputs: dict) -> Iterator[dict]:
        """The scope of one loss. Gives the inputs to compute it of: a copy.

        TRL reuses its buffered micro-batches when `num_iterations` > 1: weights written into them would compound.

        Raises:
            RuntimeError: if the loss was computed and nothing was recorded, so that no weight was applied.
        """
        recorded = len(self.statistics)
        self.inputs = dict(inputs)
        try:
            yield self.inputs
        finally:
            self.inputs = None
        if len(self.statistics) == recorded:
            raise RuntimeError(
                "GRPOTrainer._compute_loss did not ask for log-probabilities through "
                "_get_per_token_logps_and_entropies, so no influence weight was applied. This version of TRL is not "
                "supported; see setup.cfg for those that are."
            )

    def log_ratio(self, per_token_logps: Tensor) -> tuple[Tensor, Tensor]:
        """log π_θ - log π_old of the inputs, and where it is scored: both (B, T)."""
        mask = self.inputs["completion_mask"]  # (B, T)
        if "tool_mask" in self.inputs:
            mask = mask * self.inputs["tool_mask"]
        old_per_token_logps = self.inputs.get("old_per_token_logps")
        if old_per_token_logps is None:  # TRL omits them where the policy is still the one that generated
            old_per_token_logps = per_token_logps
        return per_token_logps - old_per_token_logps, mask

    def total(self, gather: Callable[[Tensor], Tensor]) -> PolicyStatistics | InfluenceStatistics:
        """The statistics of the update that ends, over all micro-batches and processes, as floats.

        Args:
            gather: Of accelerate: concatenates a tensor (N, fields) of each process.
        """
        kind = type(self.statistics[0])
        rows = torch.stack([torch.stack([value.float() for value in row]) for row in self.statistics])
        self.statistics = []
        return kind.total(gather(rows))
