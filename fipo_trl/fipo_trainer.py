"""FIPOTrainer: where the influence weights meet TRL's GRPOTrainer. The formulas are in `influence.py`.

`GRPOTrainer._compute_loss` first asks `_get_per_token_logps_and_entropies` for the log-probabilities of the policy.
Only then does it read `inputs["advantages"]`, which may have one value per token. So one forward serves both: while
the loss is computed, the second method also writes `A * f` into the inputs that the first is about to read. All else
(clipping, dual clip, aggregation, KL, entropy bonus, vLLM correction, tool masks, images, metrics) is TRL's.
"""

import os
import textwrap

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, send_to_device
from trl import GRPOConfig, GRPOTrainer
from trl.import_utils import is_vllm_available
from trl.trainer.utils import get_config_model_id

from fipo_trl import vllm_cpu
from fipo_trl.fipo_config import FIPOConfig
from fipo_trl.influence import InfluenceStatistics, influence_weights
from fipo_trl.length_grouping import log_probs_by_length, regroup, trim, unknown_keys


logger = get_logger(__name__)

GENERATION_STATE_NAME = "generation_state_{rank}.pt"
ENGINE_MISMATCH_BOUND = 0.05  # nats per token, the mean: bf16 alone stays below 0.03; stale weights soon exceed it


class FIPOTrainer(GRPOTrainer):
    """
    Trainer for Future-KL Influenced Policy Optimization (FIPO), a drop-in replacement for [`~trl.GRPOTrainer`].

    FIPO multiplies the advantage of each token by how the policy has shifted on all that follows it
    (https://arxiv.org/abs/2603.19835).

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

    def __init__(self, model, reward_funcs=None, args: GRPOConfig | None = None, *positional, **keywords):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = FIPOConfig(f"{model_id.split('/')[-1]}-FIPO", use_cpu=not torch.accelerator.is_available())
        elif not isinstance(args, GRPOConfig):
            raise TypeError(f"args must be a FIPOConfig or a GRPOConfig, got {type(args).__name__}.")
        adopted = {}
        if not isinstance(args, FIPOConfig):
            args, adopted = FIPOConfig.from_grpo_config(args)

        self._weighted_inputs = None  # the inputs of the loss being computed; None outside of a loss
        self._update_statistics = []  # one (len(InfluenceStatistics),) tensor per micro-batch of this update
        self._inert_updates = 0  # updates in a row in which FIPO equalled DAPO
        self._train_sampler = None  # TRL's; None for iterable datasets
        self._grouping_explained = False
        self._mismatch_explained = False
        if args.use_vllm and args.vllm_mode == "colocate" and is_vllm_available():
            vllm_cpu.refuse_untested_version()
        super().__init__(model, reward_funcs, args, *positional, **keywords)
        self._check_ends()

        if adopted:
            values = ", ".join(f"{name}={value}" for name, value in adopted.items())
            logger.warning(f"GRPOConfig was promoted to FIPOConfig. Settings left at TRL's defaults became: {values}.")

    # The rollout engine

    def _check_ends(self):
        """Refuse what lets every completion, or every long one, stop where the policy did not end it.

        vLLM cuts a completion where its context ends, and says nothing.
        """
        if None in self.eos_token_ids:
            raise ValueError(
                f"The tokenizer of {self.model.name_or_path} has no EOS token, so that no completion would end before "
                f"max_completion_length={self.max_completion_length}. Set eos_token on the tokenizer (an instruction "
                "model ends its turns with one, such as <|im_end|>)."
            )
        if not self.use_vllm or self.vllm_mode != "colocate" or self._is_vlm or self.environment_factories:
            return
        if not hasattr(self.train_dataset, "__len__"):  # a stream
            return
        context = self.vllm_generation.llm.llm_engine.model_config.max_model_len
        longest = max(self.train_dataset["prompt"], key=lambda prompt: len(str(prompt)))  # in characters
        prompt_ids, *_ = self._tokenize_prompts([longest])
        needed = len(prompt_ids[0]) + self.max_completion_length
        if needed > context:
            raise ValueError(
                f"vllm_max_model_length={self.args.vllm_max_model_length} gives the engine a context of {context} "
                f"tokens, but the longest prompt ({len(prompt_ids[0])} tokens) and max_completion_length="
                f"{self.max_completion_length} need {needed}: vLLM would cut long completions short without a word. "
                f"Set vllm_max_model_length={needed} (not above max_position_embeddings of the model), lower "
                "max_completion_length, or take out the longest prompts."
            )

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        self._log_engine_mismatch(outputs)
        return outputs

    def _log_engine_mismatch(self, generation):
        """Log |log π_engine - log π_old| of the scored tokens, where an engine such as vLLM reported the former.

        The loss does not see it: π_old is computed here, by the trainer, lest Future-KL sums up engine noise. TRL
        needs no π_old where one update follows each generation; then there is nothing to compare.
        """
        engine_logps = generation.get("sampling_per_token_logps")  # (B, T), NaN where the engine had none
        old_logps = generation.get("old_per_token_logps")  # (B, T)
        if engine_logps is None or old_logps is None:
            return
        scored = generation["completion_mask"].bool()
        if "tool_mask" in generation:
            scored = scored & generation["tool_mask"].bool()
        mismatch = (engine_logps - old_logps).abs()
        known = scored & mismatch.isfinite()
        mismatch = mismatch.masked_fill(~known, 0.0)
        local = torch.stack([mismatch.sum(), known.sum(), (scored & ~known).sum(), mismatch.max()])
        gathered = self.accelerator.gather(local.unsqueeze(0))  # (ranks, 4)
        total, tokens, nan_tokens, _ = gathered.sum(dim=0).tolist()
        mean = total / max(tokens, 1.0)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["fipo/engine_mismatch/mean"].append(mean)
        metrics["fipo/engine_mismatch/max"].append(gathered[:, 3].max().item())
        metrics["fipo/engine_mismatch/nan_tokens"].append(nan_tokens)
        if mean > ENGINE_MISMATCH_BOUND and not self._mismatch_explained:
            self._mismatch_explained = True
            logger.warning(
                f"fipo/engine_mismatch/mean={mean:.3f} nats per token is above {ENGINE_MISMATCH_BOUND}: the engine "
                "does not sample from the policy that is trained. If it grows, weights do not reach the engine. If "
                "not, the engine computes otherwise (precision, kernels, experts) or samples from a part of the "
                "distribution (top_p, top_k, min_p, repetition_penalty): set vllm_importance_sampling_correction=True "
                "and vllm_importance_sampling_mode='token_truncate', or match the precisions."
            )

    # Micro-batches without padding

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.args.group_by_length and self._buffered_inputs is not before:  # a new generation
            self._buffered_inputs = self._group_by_length(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _group_by_length(self, micro_batches):
        if unknown := unknown_keys(micro_batches[0]):
            self._explain_no_grouping(f"micro-batches with {', '.join(sorted(unknown))} are neither sorted nor cut")
            return micro_batches
        per_update = self.args.gradient_accumulation_steps
        shared = {  # what makes the loss of a row depend on the other rows of its micro-batch
            "loss_type='bnpo'": self.loss_type == "bnpo",
            "an entropy bonus": self._entropy_bonus_enabled,
            "top_entropy_quantile < 1": self.top_entropy_quantile < 1.0,
            "the router's auxiliary loss": self.aux_loss_enabled,
            "updates that span two generations": self.args.steps_per_generation % per_update != 0,
        }
        if reasons := [reason for reason, applies in shared.items() if applies]:
            self._explain_no_grouping(f"with {' and '.join(reasons)} micro-batches are cut, but not sorted")
            return [trim(batch) for batch in micro_batches]
        return regroup(micro_batches, per_update)

    def _explain_no_grouping(self, reason):
        if not self._grouping_explained:
            logger.warning(f"group_by_length: {reason}.")
            self._grouping_explained = True

    # The loss

    def _compute_loss(self, model, inputs):
        if not self.model.training:  # evaluation completions come from the policy itself: every weight would be 1
            return super()._compute_loss(model, inputs)
        # A copy, because TRL reuses its buffered micro-batches when num_iterations > 1: weights must not compound
        self._weighted_inputs = weighted_inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, weighted_inputs)
        finally:
            self._weighted_inputs = None
        if weighted_inputs["advantages"] is inputs["advantages"]:
            raise RuntimeError(
                "GRPOTrainer._compute_loss did not ask for log-probabilities through "
                "_get_per_token_logps_and_entropies, so no influence weight was applied. This version of TRL is not "
                "supported; see setup.cfg for those that are."
            )
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._weighted_inputs is None and self.args.group_by_length:  # old and reference log-probs
            return log_probs_by_length(super()._get_per_token_logps_and_entropies, *args, **kwargs)
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._weighted_inputs is not None:
            self._weight_advantages(self._weighted_inputs, per_token_logps=outputs[0].detach())
        return outputs

    def _weight_advantages(self, inputs, per_token_logps):
        """Replace the advantages (B,) in `inputs` by `A f` (B, T), 0 for sequences that leave the policy loss."""
        mask = inputs["completion_mask"]  # (B, T)
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        old_per_token_logps = inputs.get("old_per_token_logps")
        if old_per_token_logps is None:  # TRL omits them where the policy is still the one that generated
            old_per_token_logps = per_token_logps
        advantages = inputs["advantages"]
        influence = influence_weights(
            per_token_logps - old_per_token_logps,
            advantages,
            mask,
            half_life=self.args.future_kl_half_life,
            weight_min=self.args.influence_weight_min,
            weight_max=self.args.influence_weight_max,
            dual_clip=self.args.delta,
            safety_ratio=self.args.influence_safety_ratio,
        )
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
        self._update_statistics.append(torch.stack([value.float() for value in statistics]))

    # The end of an update

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._finish_update()
        return loss

    def _finish_update(self):
        """Reduce the statistics of an update over its micro-batches and ranks, and act on them."""
        gathered = self.accelerator.gather(torch.stack(self._update_statistics))  # (ranks * micro-batches, statistics)
        self._update_statistics = []
        total = InfluenceStatistics(*gathered.sum(dim=0).tolist())
        total = total._replace(
            weight_min=gathered[:, InfluenceStatistics._fields.index("weight_min")].min().item(),
            weight_max=gathered[:, InfluenceStatistics._fields.index("weight_max")].max().item(),
        )
        if total.tokens == 0:
            return
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
            "fipo/dual_clip_fraction": total.dual_clipped,
            "fipo/policy_kl": total.policy_kl,
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
                f"weight was 1, so this run is DAPO. The policy hardly moves between updates (fipo/policy_kl), or the "
                f"bounds [{self.args.influence_weight_min}, {self.args.influence_weight_max}] leave no room. Check "
                f"learning_rate={self.args.learning_rate} and warmup_steps={self.args.warmup_steps:g}."
            )

    # Data and resuming

    def get_train_dataloader(self):
        args = self.args
        prompts = args.generation_batch_size // args.num_generations
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset) < prompts:
            raise ValueError(
                f"train_dataset has {len(self.train_dataset)} rows, fewer than the {prompts} prompts of one "
                f"generation (generation_batch_size={args.generation_batch_size} / num_generations="
                f"{args.num_generations}): TRL would stop before the first update. Add prompts, or lower "
                f"steps_per_generation={args.steps_per_generation}."
            )
        return super().get_train_dataloader()

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_optimizer_and_scheduler(self, output_dir):
        """Save, too, where this rank stands in its generation, and the completions still in use."""
        super()._save_optimizer_and_scheduler(output_dir)
        mid_generation = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        state = {
            "layout": self._generation_layout(),
            "step": self._step,
            "buffered_inputs": self._buffered_inputs if mid_generation else None,
        }
        os.makedirs(output_dir, exist_ok=True)  # nodes without a shared file system
        torch.save(state, os.path.join(output_dir, GENERATION_STATE_NAME.format(rank=self.args.process_index)))

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Restore, too, what TRL forgets: the place in the generation with its completions, and the prompts' order."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self._train_sampler is not None and self._train_sampler.shuffle:
            # One order of the prompts is drawn per epoch, from a generator of the sampler's own that starts anew
            for _ in range(int(self.state.epoch)):
                torch.randperm(self._train_sampler.num_samples, generator=self._train_sampler.generator)

        path = os.path.join(checkpoint, GENERATION_STATE_NAME.format(rank=self.args.process_index))
        state = None
        if os.path.isfile(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if state is None or state["layout"] != self._generation_layout():
            logger.warning(
                f"{checkpoint} holds no generation state for this process and batch layout: the run goes on with a "
                "new generation, and may see other completions than an uninterrupted run."
            )
            return
        self._step = state["step"]
        self._buffered_inputs = send_to_device(state["buffered_inputs"], self.accelerator.device)

    def _generation_layout(self) -> dict:
        """What must not change if a generation is to be continued."""
        names = ("world_size", "per_device_train_batch_size", "steps_per_generation", "num_iterations")
        return {name: getattr(self.args, name) for name in names}
