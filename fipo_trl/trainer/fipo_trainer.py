"""FIPOTrainer: where the influence weights meet TRL's loss. The formulas are in `influence.py`.

`GRPOTrainer._compute_loss` first asks `_get_per_token_logps_and_entropies` for the log-probabilities of the policy.
Only then does it read `inputs["advantages"]`, which may have one value per token. So one forward serves both: while
the loss is computed, the second method also writes `A * f` into the inputs that the first is about to read. All else
(clipping, dual clip, aggregation, KL, entropy bonus, vLLM correction, tool masks, images, metrics) is TRL's.
"""

import textwrap

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType

from fipo_trl.objective.influence import InfluenceStatistics, influence_weights
from fipo_trl.trainer.dapo_trainer import DAPOTrainer
from fipo_trl.trainer.fipo_config import FIPOConfig
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
            outputs["rewards"] = self._rewards(len(outputs["advantages"])).to(outputs["advantages"].device)
        return outputs

    def _rewards(self, rows: int) -> torch.Tensor:
        """Weighted rewards (B,) of the completions just generated, NaN where no function gave one.

        TRL keeps them for its own table, those of all processes in order, and hands on the advantages alone.
        """
        by_function = torch.tensor([list(self._logs["rewards"][name]) for name in self.reward_func_names])
        rewards = (by_function * self.reward_weights.cpu().unsqueeze(1)).nansum(dim=0)
        rewards[by_function.isnan().all(dim=0)] = torch.nan
        return rewards[self.accelerator.process_index * rows :][:rows]

    # The loss

    def _weight_advantages(self, inputs, per_token_logps) -> InfluenceStatistics:
        """Replace the advantages (B,) in `inputs` by `A f` (B, T), 0 for sequences that leave the policy loss."""
        advantages = inputs["advantages"]
        log_ratio, mask = self._log_ratio(inputs, per_token_logps)
        influence = influence_weights(
            log_ratio,
            advantages,
            mask,
            half_life=self.args.future_kl_half_life,
            weight_min=self.args.influence_weight_min,
            weight_max=self.args.influence_weight_max,
            dual_clip=self.args.delta,
            safety_ratio=self.args.influence_safety_ratio,
            participation_mask=self.args.future_kl_participation_mask,
        )
        if self._token_credit is not None:
            self._token_credit.record(self._step, self.state.global_step + 1, inputs, log_ratio, influence)
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        weighted = advantages * influence.weights
        statistics = influence.statistics
        if self.args.drop_dual_clipped_sequences:
            weighted = weighted * influence.kept.unsqueeze(1)
        else:
            none = torch.zeros_like(statistics.dropped_tokens)
            statistics = statistics._replace(dropped_sequences=none, dropped_tokens=none)
        inputs["advantages"] = weighted
        return statistics

    # The end of an update

    def _finish_update(self, statistics: torch.Tensor):
        """Reduce the statistics of an update, (ranks * micro-batches, statistics), and act on them."""
        total = InfluenceStatistics(*statistics.sum(dim=0).tolist())
        total = total._replace(
            weight_min=statistics[:, InfluenceStatistics._fields.index("weight_min")].min().item(),
            weight_max=statistics[:, InfluenceStatistics._fields.index("weight_max")].max().item(),
        )
        if total.tokens == 0:
            return
        self._log_policy(total)
        self._exclude_dropped_tokens_from_mean(total)
        self._log_statistics(total)
        self._warn_if_inert(total)

    def _exclude_dropped_tokens_from_mean(self, total: InfluenceStatistics):
        """Make the update a mean over the tokens of kept sequences.

        A sequence with zero advantage leaves the numerator of TRL's token mean, not its denominator, which is fixed
        before the forward pass that decides. The gradient is linear in 1 / denominator, so it is corrected here,
        before clipping (and with it that of a KL penalty or entropy bonus, if there is one). DeepSpeed has already
        taken its step by now: there, dropped tokens stay in the denominator.
        """
        if self.loss_type != "dapo" or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return
        if 0 < total.dropped_tokens < total.tokens:
            correction = total.tokens / (total.tokens - total.dropped_tokens)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(correction)

    def _log_statistics(self, total: InfluenceStatistics):
        per_token = {
            "fipo/future_kl": total.future_kl,
            "fipo/influence_weight/mean": total.weight,
            "fipo/influence_weight/low_clip_fraction": total.low_clipped,
            "fipo/influence_weight/high_clip_fraction": total.high_clipped,
            "fipo/active_fraction": total.active,
            "fipo/masked_fraction": total.masked,
            "fipo/safety_fraction": total.safety_capped,
        }
        metrics = self._metrics["train"]
        for name, value in per_token.items():
            metrics[name].append(value / total.tokens)
        metrics["fipo/influence_weight/min"].append(total.weight_min)
        metrics["fipo/influence_weight/max"].append(total.weight_max)
        metrics["fipo/dropped_sequence_fraction"].append(total.dropped_sequences / total.sequences)

    def _warn_if_inert(self, total: InfluenceStatistics):
        """Say so once when FIPO has equalled DAPO for two whole generations."""
        if self.args.fipo_is_off:
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
