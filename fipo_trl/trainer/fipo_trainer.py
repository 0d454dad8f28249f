"""FIPOTrainer: where the influence weights meet TRL's loss. The formulas are in `influence.py`.

While TRL computes a loss, and has computed the log-probabilities of the policy, but has not read the advantages yet,
`A * f` takes the place of the advantages (`loss_scope.py`). So one forward serves both. All else (clipping, dual clip,
aggregation, KL, entropy bonus, vLLM correction, tool masks, images, metrics) is TRL's.
"""

import textwrap

import torch
from accelerate.logging import get_logger
from torch import Tensor

from fipo_trl.objective.influence import InfluenceStatistics, InfluenceWeights, influence_weights
from fipo_trl.trainer.dapo_trainer import DAPOTrainer
from fipo_trl.trainer.fipo_config import FIPOConfig
from fipo_trl.trainer.sharding import restore_loss_scale, scale_gradients, scale_whole_update
from fipo_trl.trainer.token_credit import TokenCreditTracer


logger = get_logger(__name__)


class FIPOTrainer(DAPOTrainer):
    """
    Trainer for Future-KL Influenced Policy Optimization (FIPO), a drop-in replacement for [`~trl.GRPOTrainer`].

    FIPO multiplies the advantage of each token by how the policy has shifted on all that follows it
    (https://arxiv.org/abs/2603.19835). Dynamic sampling, length grouping and exact resuming are those of
    [`DAPOTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from fipo_trl import FIPOTrainer
    >>> from trl.rewards import accuracy_reward

    >>> trainer = FIPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model, reward_funcs, train_dataset, ...:
            As for [`~trl.GRPOTrainer`].
        args ([`FIPOConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration of this trainer. A [`~trl.GRPOConfig`] is promoted, see [`FIPOConfig.from_grpo_config`], and
            the values adopted are logged. If `None`, a default [`FIPOConfig`] is used.
    """

    _tag_names = ["trl", "fipo"]
    _name = "FIPO"
    _config_class = FIPOConfig
    _paper = {
        "title": "FIPO: Eliciting Deep Reasoning with Future-KL Influenced Policy Optimization",
        "id": "2603.19835",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{qwenpilot2026fipo,
                title        = {{FIPO: Eliciting Deep Reasoning with Future-KL Influenced Policy Optimization}},
                author       = {{Qwen Pilot Team}},
                year         = 2026,
                eprint       = {arXiv:2603.19835},
            }"""),
    }

    def __init__(self, *args, **kwargs):
        self._inert_updates = 0  # updates in a row in which FIPO equalled DAPO
        super().__init__(*args, **kwargs)
        self._token_credit = TokenCreditTracer(self.args, self._tokenizer) if self.args.token_credit_every else None

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        if self._token_credit is not None and self.model.training:
            outputs["rewards"] = self._weighted_rewards(len(outputs["advantages"]))
        return outputs

    def _weighted_rewards(self, rows: int) -> Tensor:
        """Rewards (B,) of this process's completions, summed over the functions, NaN where none gave one."""
        first = self.accelerator.process_index * rows
        by_function = self._rewards_per_function[first : first + rows]
        rewards = (by_function * self.reward_weights.to(by_function.device)).nansum(dim=1)
        return rewards.masked_fill(by_function.isnan().all(dim=1), torch.nan)

    # A log-ratio becomes a weight

    def _influence(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> InfluenceWeights:
        """The weights of a micro-batch; arguments as for `influence_weights`.

        A subclass may give others, with `InfluenceWeights.reweighted`. `self._loss_scope.inputs` are TRL's: the token
        ids of prompts and completions.
        """
        args = self.args
        return influence_weights(
            log_ratio,
            advantages,
            mask,
            half_life=args.future_kl_half_life,
            weight_min=args.influence_weight_min,
            weight_max=args.influence_weight_max,
            dual_clip=args.delta,
            safety_ratio=args.influence_safety_ratio,
            participation_mask=args.future_kl_participation_mask,
        )

    def _weight_advantages(self, per_token_logps: Tensor) -> InfluenceStatistics:
        """Replace the advantages (B,) of the loss by `A f` (B, T), 0 for sequences that leave the policy loss."""
        args, inputs = self.args, self._loss_scope.inputs
        advantages = inputs["advantages"]
        log_ratio, mask = self._loss_scope.log_ratio(per_token_logps)
        influence = self._influence(log_ratio, advantages, mask)
        if self._token_credit is not None:
            self._token_credit.record(self._step, self.state.global_step + 1, inputs, log_ratio, influence)
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        weighted = advantages * influence.weights
        statistics = influence.statistics
        if args.drop_dual_clipped_sequences:
            weighted = weighted * influence.kept.unsqueeze(1)
        else:
            none = torch.zeros_like(statistics.dropped_tokens)
            statistics = statistics._replace(dropped_sequences=none, dropped_tokens=none)
        inputs["advantages"] = weighted
        return statistics

    # Weights become metrics

    def _finish_update(self, total: InfluenceStatistics):  # type: ignore[override]  # what `_weight_advantages` gave
        super()._finish_update(total)
        self._correct_gradients(total)
        self._log_metrics(influence_metrics(total))
        self._warn_if_inert(total)

    # A token mean becomes one over the tokens of kept sequences
    #
    # A sequence with zero advantage leaves the numerator of TRL's token mean, not its denominator, which is fixed
    # before the forward pass that decides. The gradient is linear in 1 / denominator, so it is corrected before it is
    # clipped (and with it that of a KL penalty or entropy bonus, if there is one).

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.is_deepspeed_enabled and self.model.training and self.accelerator.sync_gradients:
            # DeepSpeed steps inside the backward pass: the last micro-batch of the update brings the correction along
            seen = [each for each in self._loss_scope.statistics if isinstance(each, InfluenceStatistics)]
            rows = [torch.stack([each.tokens, each.dropped_tokens]) for each in seen]
            counts = self.accelerator.reduce(torch.stack(rows).sum(dim=0), reduction="sum").tolist()
            loss = scale_whole_update(loss, self._mean_correction(*counts), model, self.args)
        return loss

    def _correct_gradients(self, total: InfluenceStatistics):
        if self.is_deepspeed_enabled:
            restore_loss_scale(self.deepspeed)
        else:
            scale_gradients(self.model, self._mean_correction(total.tokens, total.dropped_tokens))

    def _mean_correction(self, tokens: float, dropped: float) -> float:
        """What makes a mean over the tokens of an update one over those that are not dropped."""
        if self.loss_type != "dapo" or not 0 < dropped < tokens or not self.args.drop_dual_clipped_sequences:
            return 1.0
        return tokens / (tokens - dropped)

    def _warn_if_inert(self, total: InfluenceStatistics):
        """Say so once when FIPO has equalled DAPO for two whole generations."""
        if self.args.fipo_is_off or self._reward_calls.nothing_scored:  # which has been said
            return
        patience = 2 * self.args.updates_per_generation
        was_inert = self._inert_updates >= patience
        self._inert_updates = 0 if total.active else self._inert_updates + 1
        if self._inert_updates >= patience and not was_inert:
            logger.warning(
                f"FIPO is not acting: in the last {self._inert_updates} updates (two generations) every influence "
                f"weight was 1, so this run is DAPO. The policy hardly moves between updates (policy/kl), or the "
                f"bounds [{self.args.influence_weight_min}, {self.args.influence_weight_max}] leave no room. Check "
                f"learning_rate={self.args.learning_rate} and warmup_steps={self.args.warmup_steps:g}."
            )


def influence_metrics(total: InfluenceStatistics) -> dict[str, float]:
    """What is logged under `fipo/` of an update."""
    per_token = {
        "future_kl": total.future_kl,
        "influence_weight/mean": total.weight,
        "influence_weight/low_clip_fraction": total.low_clipped,
        "influence_weight/high_clip_fraction": total.high_clipped,
        "active_fraction": total.active,
        "masked_fraction": total.masked,
        "safety_fraction": total.safety_capped,
    }
    return {f"fipo/{name}": value / total.tokens for name, value in per_token.items()} | {
        "fipo/influence_weight/min": total.weight_min,
        "fipo/influence_weight/max": total.weight_max,
        "fipo/dropped_sequence_fraction": total.dropped_sequences / total.sequences,
    }
