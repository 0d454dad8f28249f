"""Influence weights: from Future-KL to the factor by which FIPO multiplies each token's advantage (FIPO, eq. 5-7).

Data flow: log-ratio d -> ratio r = exp(d) -> participation r <= c -> Future-KL F -> f = clip(exp(F)) -> safety cap.
Where the paper and its code differ, the code is followed (github.com/qwenpilot/FIPO, on verl).

Shapes: B sequences, T completion tokens. Source: https://arxiv.org/abs/2603.19835.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fipo_trl.objective.future_kl import future_kl


LOG_RATIO_LIMIT = 20.0  # nats; the official code clamps log-ratios here before it exponentiates them
SAFETY_RANGE = (0.8, 1.0)  # what the official safety cap clips a weight to; the paper writes 1
ACTIVE_DISTANCE = 1e-4  # a token with |f - 1| above this is one on which FIPO differs from DAPO


Sum = Any  # a 0-d tensor of a batch, a float in the total of several


class InfluenceStatistics(NamedTuple):
    """Sums over the scored tokens of a batch, each a 0-d tensor. `total` makes floats of several batches.

    Fractions of tokens are a count over `tokens`, those of sequences over `sequences`. The last two are extremes.
    """

    tokens: Sum  # scored tokens
    sequences: Sum  # rows with at least one scored token
    dropped_sequences: Sum  # rows that leave the loss
    dropped_tokens: Sum  # scored tokens of those rows
    policy_kl: Sum  # sum of -d: the estimate of KL(pi_old || pi_theta) that the paper plots
    future_kl: Sum  # sum of F
    weight: Sum  # sum of f
    active: Sum  # count of |f - 1| > ACTIVE_DISTANCE
    low_clipped: Sum  # count of f at weight_min, after the safety cap, as the official code counts
    high_clipped: Sum  # count of f at weight_max, likewise
    masked: Sum  # count of tokens that take no part in Future-KL: r > c
    safety_capped: Sum  # count of A < 0 and r > s
    dual_clipped: Sum  # count of A < 0 and r > c
    weight_min: Sum  # smallest f, +inf without scored tokens
    weight_max: Sum  # largest f, -inf without scored tokens

    @classmethod
    def total(cls, rows: Tensor) -> "InfluenceStatistics":
        """The statistics of several batches taken together, as floats. `rows` are (N, fields), one batch a row."""
        extremes = {"weight_min": Tensor.amin, "weight_max": Tensor.amax}
        columns = zip(cls._fields, rows.unbind(dim=1), strict=True)
        return cls(*torch.stack([extremes.get(name, Tensor.sum)(column) for name, column in columns]).tolist())


class PolicyStatistics(NamedTuple):
    """Those of them that do not depend on the weights."""

    tokens: Sum
    policy_kl: Sum
    dual_clipped: Sum

    @classmethod
    def total(cls, rows: Tensor) -> "PolicyStatistics":
        """As [`InfluenceStatistics.total`]."""
        return cls(*rows.sum(dim=0).tolist())


@dataclass(frozen=True)
class InfluenceWeights:
    """What FIPO knows about a batch before the loss. Everything is detached."""

    weights: Tensor  # (B, T) f, the factor on each token's advantage
    future_kl: Tensor  # (B, T) F
    kept: Tensor  # (B,) bool, False where the sequence leaves the loss
    masked: Tensor  # (B, T) bool, takes no part in Future-KL: r > c, nowhere without the participation mask
    safety_capped: Tensor  # (B, T) bool, A < 0 and r > s
    dual_clipped: Tensor  # (B, T) bool, A < 0 and r > c
    statistics: InfluenceStatistics

    def reweighted(self, weights: Tensor, mask: Tensor, *, weight_min: float, weight_max: float) -> "InfluenceWeights":
        """The same with other weights, for one who asks what FIPO's are worth.

        Args:
            weights: (B, T).
            mask, weight_min, weight_max: As for `influence_weights`.
        """
        changed = weight_statistics(weights, mask != 0, weight_min, weight_max)
        return replace(self, weights=weights, statistics=self.statistics._replace(**changed))


@torch.no_grad()  # f scales the advantage; a gradient through it would reward moving the policy for its own sake
def influence_weights(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    half_life: float = 32.0,
    weight_min: float = 1.0,
    weight_max: float = 1.2,
    dual_clip: float = 10.0,
    safety_ratio: float = 10.0,
    participation_mask: bool = True,
) -> InfluenceWeights:
    """Weight each token by the shift of the policy on all that follows it.

    Args:
        log_ratio: (B, T), `log pi_theta - log pi_old`, in nats, any floating dtype. Values where `mask` is 0 are never
            read. Clamped to [-20, 20].
        advantages: (B,) or (B, T).
        mask: (B, T), true or non-zero where the token is scored: neither padding nor tool output.
        half_life: Future-KL half-life in tokens (tau; paper eq. 6).
        weight_min, weight_max: absolute bounds of f (paper eq. 7): [1.0, 1.2] at 32B, [0.8, 1.2] at 7B.
        dual_clip: c. A token with a ratio above it takes no part in Future-KL (paper eq. 5), and where A < 0 it is
            dual-clipped; a sequence in which more than one token is so leaves the loss.
        safety_ratio: s. Where A < 0 and the ratio exceeds it, f is clipped to [0.8, 1.0].
        participation_mask: Whether tokens with a ratio above c are left out of Future-KL. The paper's ablation leaves
            them in; the dual clip and the sequence drop stay.

    Returns:
        The weights, Future-KL, the sequences kept, and statistics, in float64 for float64 log-ratios, else float32.

    Raises:
        ValueError: if shapes do not fit or a setting is out of range; the message names it.
    """
    if advantages.shape not in (log_ratio.shape, log_ratio.shape[:1]):
        raise ValueError(
            f"advantages must have shape (B,) or (B, T) = {tuple(log_ratio.shape)}, got {tuple(advantages.shape)}."
        )
    if not 0.0 <= weight_min <= weight_max:
        raise ValueError(f"0 <= weight_min <= weight_max must hold, got {weight_min} and {weight_max}.")
    if not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be greater than 1, got {dual_clip}.")
    if not safety_ratio > 0.0:
        raise ValueError(f"safety_ratio must be greater than 0, got {safety_ratio}.")

    scored = mask != 0
    log_ratio = log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32))
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).masked_fill(~scored, 0.0)
    ratio = log_ratio.exp()
    too_far = scored & (ratio > dual_clip)
    penalised = scored & ((advantages if advantages.dim() == 2 else advantages.unsqueeze(1)) < 0)
    dual_clipped = too_far & penalised
    safety_capped = penalised & (ratio > safety_ratio)
    kept = dual_clipped.sum(dim=1) <= 1

    masked = too_far if participation_mask else torch.zeros_like(too_far)
    kl = future_kl(log_ratio, ~masked, half_life=half_life)
    weights = kl.exp().clamp(weight_min, weight_max)
    weights = torch.where(safety_capped, weights.clamp(*SAFETY_RANGE), weights)

    row_tokens = scored.sum(dim=1)
    statistics = InfluenceStatistics(
        tokens=row_tokens.sum(),
        sequences=(row_tokens > 0).sum(),
        dropped_sequences=(~kept).sum(),
        dropped_tokens=row_tokens.masked_fill(kept, 0).sum(),
        policy_kl=-log_ratio.sum(),
        future_kl=kl.masked_fill(~scored, 0.0).sum(),
        masked=masked.sum(),
        safety_capped=safety_capped.sum(),
        dual_clipped=dual_clipped.sum(),
        **weight_statistics(weights, scored, weight_min, weight_max),
    )
    return InfluenceWeights(
        weights=weights,
        future_kl=kl,
        kept=kept,
        masked=masked,
        safety_capped=safety_capped,
        dual_clipped=dual_clipped,
        statistics=statistics,
    )


def weight_statistics(weights: Tensor, scored: Tensor, weight_min: float, weight_max: float) -> dict[str, Tensor]:
    """The fields of `InfluenceStatistics` that the weights (B, T) decide. `scored` is (B, T), bool."""
    return {
        "weight": weights.masked_fill(~scored, 0.0).sum(),
        "active": (scored & ((weights - 1.0).abs() > ACTIVE_DISTANCE)).sum(),
        "low_clipped": (scored & (weights <= weight_min)).sum(),
        "high_clipped": (scored & (weights >= weight_max)).sum(),
        "weight_min": weights.masked_fill(~scored, torch.inf).amin(),
        "weight_max": weights.masked_fill(~scored, -torch.inf).amax(),
    }


@torch.no_grad()
def policy_statistics(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, dual_clip: float) -> PolicyStatistics:
    """What `influence_weights` counts of the policy, at a fraction of its cost, where nothing is weighted (DAPO).

    Args:
        log_ratio, advantages, mask, dual_clip: As for `influence_weights`.
    """
    scored = mask != 0
    log_ratio = log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32))
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).masked_fill(~scored, 0.0)
    penalised = (advantages if advantages.dim() == 2 else advantages.unsqueeze(1)) < 0
    return PolicyStatistics(
        tokens=scored.sum(),
        policy_kl=-log_ratio.sum(),
        dual_clipped=(penalised & (log_ratio.exp() > dual_clip)).sum(),
    )
