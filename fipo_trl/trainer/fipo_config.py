"""The settings of FIPO, their bounds, and the guard against runs in which FIPO would silently be DAPO."""

import math
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from fipo_trl.trainer.dapo_config import UPDATES_PER_GENERATION, DAPOConfig


@dataclass
class FIPOConfig(DAPOConfig):
    r"""
    Configuration class for the [`FIPOTrainer`].

    [`FIPOConfig`] inherits every parameter from [`DAPOConfig`], and so from [`~trl.GRPOConfig`]. The defaults are
    those of the FIPO paper's Qwen2.5-32B run (https://arxiv.org/abs/2603.19835, and its official code where the paper
    is silent). `delta` is also the ratio above which a token takes no part in Future-KL (eq. 5). With one update per
    generation the policy equals the policy that generated, and FIPO equals DAPO: that is refused.

    Parameters:
        > Parameters of FIPO

        future_kl_half_life (`float`, *optional*, defaults to `32.0`):
            Half-life of Future-KL, in tokens: a token this far ahead counts half. τ in the paper (eq. 6). `inf`
            discounts nothing.
        future_kl_participation_mask (`bool`, *optional*, defaults to `True`):
            Whether tokens with a probability ratio above `delta` are left out of Future-KL (eq. 5). `False` is the
            paper's ablation; its run collapsed.
        influence_weight_min (`float`, *optional*, defaults to `1.0`):
            Lower bound of the influence weight, absolute, not an offset from 1. The paper's 1 - ε_f,low (eq. 7): 1.0
            at 32B, 0.8 at 7B.
        influence_weight_max (`float`, *optional*, defaults to `1.2`):
            Upper bound of the influence weight, absolute. The paper's 1 + ε_f,high (eq. 7). Setting both bounds to 1
            switches the weights off, and with `drop_dual_clipped_sequences=False` all of FIPO.
        influence_safety_ratio (`float`, *optional*, defaults to `10.0`):
            Where the advantage is negative and the probability ratio exceeds this, the influence weight is clipped to
            [0.8, 1.0]. 10 in the official 32B run, 3 at 7B.
        drop_dual_clipped_sequences (`bool`, *optional*, defaults to `True`):
            Whether a completion in which more than one token is dual-clipped (negative advantage, ratio above
            `delta`) leaves the loss and, for `loss_type="dapo"`, the token mean. As in the official code.

        > Parameters of monitoring

        token_credit_every (`int`, *optional*):
            Every so many generations, store the weights, Future-KL and log-ratios of the tokens of up to 64
            completions under `output_dir/token_credit`, for `fipo-trl token-credit` to show. `None` or 0 stores
            nothing.
    """

    method: ClassVar[str] = "FIPO"

    future_kl_half_life: float = field(
        default=32.0,
        metadata={"help": "Half-life of Future-KL in tokens: a token this far ahead counts half (paper: tau)."},
    )
    future_kl_participation_mask: bool = field(
        default=True,
        metadata={
            "help": "Whether tokens with a probability ratio above delta are left out of Future-KL. False is the "
            "paper's ablation; its run collapsed."
        },
    )
    influence_weight_min: float = field(
        default=1.0,
        metadata={"help": "Lower bound of the influence weight, absolute (paper: 1.0 at 32B, 0.8 at 7B)."},
    )
    influence_weight_max: float = field(
        default=1.2,
        metadata={"help": "Upper bound of the influence weight, absolute. Both bounds 1 switch the weights off."},
    )
    influence_safety_ratio: float = field(
        default=10.0,
        metadata={
            "help": "Where the advantage is negative and the probability ratio exceeds this, the influence weight is "
            "clipped to [0.8, 1.0] (official code: 10 at 32B, 3 at 7B)."
        },
    )
    drop_dual_clipped_sequences: bool = field(
        default=True,
        metadata={"help": "Whether a completion with more than one dual-clipped token leaves the loss."},
    )
    token_credit_every: int | None = field(
        default=None,
        metadata={
            "help": "Every so many generations, store the weights, Future-KL and log-ratios of the tokens of up to 64 "
            "completions under output_dir/token_credit, for `fipo-trl token-credit` to show. None or 0: never."
        },
    )

    @property
    def fipo_is_off(self) -> bool:
        """Whether both weight bounds are 1, so that every influence weight is 1 by choice."""
        return self.influence_weight_min == self.influence_weight_max == 1.0

    def _check(self):
        super()._check()
        if not 0.0 < self.influence_weight_min <= self.influence_weight_max < math.inf:
            raise ValueError(
                f"influence_weight_min={self.influence_weight_min} and influence_weight_max="
                f"{self.influence_weight_max} must satisfy 0 < min <= max < inf. They are absolute bounds, not "
                "offsets from 1: set 1.0 and 1.2 (the paper's 32B run), or 0.8 and 1.2 (7B)."
            )
        if not self.future_kl_half_life > 0:
            raise ValueError(
                f"future_kl_half_life={self.future_kl_half_life} must be greater than 0 tokens. Set 32.0 (the "
                "paper's)."
            )
        if not self.influence_safety_ratio > 0:
            raise ValueError(
                f"influence_safety_ratio={self.influence_safety_ratio} must be greater than 0. Set 10.0 (the official "
                "32B run) or 3.0 (7B)."
            )
        self._check_token_credit()
        self._check_deepspeed()
        if self.updates_per_generation <= 1 and not self.fipo_is_off:
            sequences = UPDATES_PER_GENERATION * self.gradient_accumulation_steps * self.generation_batch_size
            raise ValueError(
                f"FIPO would be DAPO: steps_per_generation={self.steps_per_generation} x num_iterations="
                f"{self.num_iterations} / gradient_accumulation_steps={self.gradient_accumulation_steps} = "
                f"{self.updates_per_generation:g} gradient updates per generation. In the first update after a "
                "generation the policy is still the one that generated: every log-ratio is 0 and every influence "
                "weight 1. FIPO acts only from the second update on, and the paper makes 8. Set steps_per_generation="
                f"{UPDATES_PER_GENERATION * self.gradient_accumulation_steps} (that is, generation_batch_size="
                f"{sequences // self.steps_per_generation}). To run DAPO on purpose, use DAPOTrainer (in a "
                "recipe, trainer: dapo)."
            )

    def _check_deepspeed(self):
        """Where the tokens of dropped sequences could not leave the denominator of the token mean (`sharding.py`)."""
        plugin, steps = self.deepspeed_plugin, self.gradient_accumulation_steps
        drops = self.drop_dual_clipped_sequences and self.loss_type == "dapo"
        if plugin is not None and drops and steps > 1 and plugin.zero_stage not in (2, 3):
            raise ValueError(
                f"drop_dual_clipped_sequences=True with gradient_accumulation_steps={steps} needs DeepSpeed's ZeRO-2 "
                f"or ZeRO-3, got zero_stage={plugin.zero_stage}: the tokens of dropped sequences could not leave the "
                "token mean. Set zero_stage: 2, gradient_accumulation_steps=1, or drop_dual_clipped_sequences=False."
            )

    def _check_token_credit(self):
        every = self.token_credit_every or 0
        if every < 0:
            raise ValueError(
                f"token_credit_every={every} must be a number of generations, at least 1. Set 10, or remove it."
            )
        if 0 < self.max_steps < every * self.updates_per_generation:
            warnings.warn(
                f"token_credit_every={every} will store nothing: max_steps={self.max_steps} updates, "
                f"{self.updates_per_generation:g} per generation, end before generation {every}. Lower the one or "
                "raise the other.",
                stacklevel=4,
            )
