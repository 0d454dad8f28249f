"""DAPOTrainer: TRL's GRPOTrainer with what long DAPO and FIPO runs need beside the loss.

Dynamic sampling (the rules are in `dynamic_sampling.py`), micro-batches without padding (`length_grouping.py`), exact
resuming, and checks of the rollout engine. The loss is TRL's.
"""

import math
import os
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.import_utils import is_vllm_available
from trl.trainer.utils import get_config_model_id

from fipo_trl.engines import vllm_cpu
from fipo_trl.objective.influence import PolicyStatistics, policy_statistics
from fipo_trl.trainer.dapo_config import DAPOConfig
from fipo_trl.trainer.dynamic_sampling import Batch, DynamicSampler, Group, PromptStream
from fipo_trl.trainer.length_grouping import log_probs_by_length, regroup, trim, unknown_keys
from fipo_trl.trainer.metrics import counters, generation_metrics


logger = get_logger(__name__)

GENERATION_STATE_NAME = "generation_state_{rank}.pt"
ENGINE_MISMATCH_BOUND = 0.05  # nats per token, the mean: bf16 alone stays below 0.03; stale weights soon exceed it


class DAPOTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with DAPO's scaffold, and the control arm of [`FIPOTrainer`], which adds the weights to it.

    With `dynamic_sampling=False` and `group_by_length=False` it trains the weights that `GRPOTrainer` trains, bit for
    bit.

    Args:
        model, reward_funcs, args, train_dataset, ...:
            As for [`FIPOTrainer`]. Settings of the influence weights are not read.
    """

    _tag_names = ["trl", "dapo"]
    _name = "DAPO"
    _config_class: type[DAPOConfig] = DAPOConfig

    def __init__(self, model, reward_funcs=None, args: GRPOConfig | None = None, *positional, **keywords):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            output_dir = f"{model_id.split('/')[-1]}-{self._name}"
            args = self._config_class(output_dir, use_cpu=not torch.accelerator.is_available())
        elif not isinstance(args, GRPOConfig) or getattr(args, "method", self._name) != self._name:
            raise TypeError(
                f"args must be a {self._config_class.__name__} or a GRPOConfig, got {type(args).__name__}."
            )
        adopted = {}
        if not isinstance(args, DAPOConfig):
            args, adopted = self._config_class.from_grpo_config(args)

        self._loss_inputs = None  # the inputs of the loss being computed; None outside of a loss
        self._update_statistics = []  # what `_weight_advantages` returned, one tensor per micro-batch of this update
        self._train_sampler = None  # TRL's; None for iterable datasets
        self._replayed_rewards = None  # (all rows, F), while TRL's code runs on rollouts that are already there
        self._grouping_explained = False
        self._mismatch_explained = False
        if args.use_vllm and args.vllm_mode == "colocate" and is_vllm_available():
            vllm_cpu.refuse_untested_version()
        super().__init__(model, reward_funcs, args, *positional, **keywords)
        self._check_ends()
        self._warn_of_dropout()
        self._dynamic_sampler = self._make_dynamic_sampler() if args.dynamic_sampling else None

        if adopted:
            values = ", ".join(f"{name}={value}" for name, value in adopted.items())
            logger.warning(
                f"GRPOConfig was promoted to {self._config_class.__name__}. Settings left at TRL's defaults became: "
                f"{values}."
            )

    def _warn_of_dropout(self):
        """π_old and π_θ would draw different masks, and differ where the weights are the same."""
        dropout = max((layer.p for layer in self.model.modules() if isinstance(layer, torch.nn.Dropout)), default=0.0)
        if dropout > 0:
            logger.warning(
                f"The model has dropout ({dropout:g}; lora_dropout is 0.05 by default in TRL). It puts noise into "
                "every log-ratio, also in the first update of a generation, and Future-KL sums it up. Set "
                "lora_dropout=0.0, or disable_dropout=True for all of the model."
            )

    # Rollouts

    def _generate_and_score_completions(self, inputs):
        if self._dynamic_sampler is None or not self.model.training:
            outputs = super()._generate_and_score_completions(inputs)
            self._log_engine_mismatch(outputs)
        else:
            outputs = self._generate_mixed_groups()
        self._log_generation(outputs)
        return outputs

    def _generate_mixed_groups(self):
        batch = self._dynamic_sampler.fill(self._roll_out)
        places, rollouts = self._share_out(batch.groups)
        rewards = torch.cat([group.rewards for group in batch.groups]).to(self.accelerator.device)
        rows = [self._dynamic_sampler.stream[batch.groups[group].position] for group, _ in places]
        with self._replay(rollouts, rewards):
            outputs = super()._generate_and_score_completions(self._rows(rows))
        group_numbers = torch.tensor([group for group, _ in places], device=self.accelerator.device)
        if batch.rounds:
            self._log_engine_mismatch(outputs, fresh=group_numbers >= batch.carried_over)
        self._silence_fillers(outputs, batch, group_numbers)
        self._log_dynamic_sampling(batch)
        return outputs

    def _make_dynamic_sampler(self) -> DynamicSampler:
        args = self.args
        columns = getattr(self.train_dataset, "column_names", None) or []
        refused = {
            "tools": self.tools,
            "environments": self.environment_factories,
            "images": {"image", "images"} & set(columns),
            "a streamed dataset": not isinstance(self.train_dataset, Dataset),
        }
        if reasons := [name for name, applies in refused.items() if applies]:
            raise ValueError(
                f"dynamic_sampling=True does not work with {' and '.join(reasons)}, because rollouts must be sampled "
                "ahead and put into another batch. Set dynamic_sampling=False."
            )
        name = args.dynamic_sampling_reward or self.reward_func_names[0]
        if name not in self.reward_func_names:
            raise ValueError(
                f"dynamic_sampling_reward='{name}' is not one of the reward functions, {self.reward_func_names}."
            )
        world_size = self.accelerator.num_processes
        return DynamicSampler(
            PromptStream(len(self.train_dataset), args.seed, self.shuffle_dataset),
            args.generation_batch_size // self.num_generations,
            deciding=self.reward_func_names.index(name),
            oversample=args.dynamic_sampling_oversample,
            max_rounds=args.dynamic_sampling_max_rounds,
            carry_over=args.dynamic_sampling_carry_over,
            strict=args.dynamic_sampling_strict,
            multiple=world_size // math.gcd(world_size, self.num_generations),
        )

    def _rows(self, numbers: list[int]) -> list[dict]:
        """Rows of the dataset as the dataloader gives them: copies, because TRL adds to them."""
        dataset = self._remove_unused_columns(self.train_dataset)
        return [dict(dataset[number]) for number in numbers]

    def _places(self, groups: int) -> list[tuple[int, int]]:
        """(group, number in the group) of each completion of this process, dealt as TRL deals: in order."""
        share = groups * self.num_generations // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        return [divmod(completion, self.num_generations) for completion in range(first, first + share)]

    def _roll_out(self, rows: list[int]) -> tuple[torch.Tensor, list[dict[int, dict]]]:
        """Sample and score a group for each row of the dataset, and leave no trace in TRL's metrics.

        An engine gets all prompts at once; transformers, which would run out of memory, no more than a generation
        batch. What reward functions pass to `log_metric` cannot be told apart by completion: it stays, and describes
        all that was sampled.

        Returns:
            Rewards of all processes (groups, G, F), and for each group this process's rollouts by their number in it.
        """
        per_call = len(rows) if self.use_vllm else self._dynamic_sampler.size
        rewards, rollouts = [], [{} for _ in rows]
        for start in range(0, len(rows), per_call):
            places = self._places(len(rows[start : start + per_call]))
            inputs = self._rows([rows[start + group] for group, _ in places])
            prompts = [row["prompt"] for row in inputs]
            metrics = {name: list(values) for name, values in self._metrics["train"].items()}
            prompt_ids, completion_ids, tool_mask, completions, logps, extra, _, _ = self._generate(prompts)
            self._metrics["train"].clear()
            self._metrics["train"].update(metrics)
            extra_fields = [
                {name: values[i] if isinstance(values, list) else values for name, values in extra.items()}
                for i in range(len(inputs))
            ]
            for row, fields in zip(inputs, extra_fields, strict=True):
                row.update(fields)
            scored = self._calculate_rewards(inputs, prompts, completions, completion_ids)
            rewards.append(scored.cpu().view(-1, self.num_generations, len(self.reward_funcs)))
            for i, (group, number) in enumerate(places):
                rollouts[start + group][number] = {
                    "prompt_ids": torch.tensor(prompt_ids[i], dtype=torch.int32),
                    "completion_ids": torch.tensor(completion_ids[i], dtype=torch.int32),
                    "logprobs": logps and torch.tensor([math.nan if logp is None else logp for logp in logps[i]]),
                    "env_mask": tool_mask and torch.tensor(tool_mask[i], dtype=torch.int8),
                    "extra_fields": extra_fields[i],
                    "extra_logs": {column: values[i] for column, values in self._pending_extra_logs.items()},
                }
            self._pending_extra_logs.clear()
        return torch.cat(rewards), rollouts

    def _share_out(self, groups: list[Group]) -> tuple[list[tuple[int, int]], list[dict]]:
        """This process's share of a batch, in order. Rollouts come from whichever process sampled them.

        Returns:
            (group, number in the group) of each completion, and its rollout.
        """
        mine = [((i, number), rollout) for i, group in enumerate(groups) for number, rollout in group.rollouts.items()]
        sampled = dict(gather_object(mine))
        places = self._places(len(groups))
        return places, [sampled[place] for place in places]

    @contextmanager
    def _replay(self, rollouts: list[dict], rewards: torch.Tensor):
        """Let TRL's code generate these rollouts, through its hook `rollout_func`, and calculate these rewards.

        So it decodes, pads and logs them as its own. Tokens have been counted when they were sampled.
        """

        def replayed(prompts, trainer):
            def column(name):
                values = [rollout[name] for rollout in rollouts]
                return None if values[0] is None else [value.tolist() for value in values]

            extra = {
                name: [rollout["extra_fields"][name] for rollout in rollouts] for name in rollouts[0]["extra_fields"]
            }
            tool_mask = column("env_mask")
            if tool_mask is not None:
                extra["env_mask"] = tool_mask
            return extra | {name: column(name) for name in ("prompt_ids", "completion_ids", "logprobs")}

        for name in dict.fromkeys(name for rollout in rollouts for name in rollout["extra_logs"]):
            self._pending_extra_logs[name] = [rollout["extra_logs"].get(name) for rollout in rollouts]
        rollout_func, self.rollout_func = self.rollout_func, replayed
        tokens_seen = self.state.num_input_tokens_seen
        self._replayed_rewards = rewards
        try:
            yield
        finally:
            self._replayed_rewards = None
            self.rollout_func = rollout_func
            self.state.num_input_tokens_seen = tokens_seen
            self._metrics["train"]["num_tokens"] = [tokens_seen]

    def _calculate_rewards(self, *args, **kwargs):
        if self._replayed_rewards is not None:
            return self._replayed_rewards
        return super()._calculate_rewards(*args, **kwargs)

    def _silence_fillers(self, outputs, batch: Batch, group_numbers: torch.Tensor):
        """Groups that are not mixed teach nothing, even where another reward than the deciding one differs."""
        outputs["advantages"][group_numbers >= len(batch.groups) - batch.fillers] = 0.0
        for completion in range(1, batch.fillers * self.num_generations + 1):
            self._logs["advantages"][-completion] = 0.0

    def _log_dynamic_sampling(self, batch: Batch):
        values = {
            "rounds": batch.rounds,
            "generated": batch.generated,
            "kept": len(batch.groups) - batch.fillers,
            "surplus": batch.surplus,
            "carried_over": batch.carried_over,
        }
        if batch.generated:
            values |= {
                "all_right_fraction": batch.all_right / batch.generated,
                "all_wrong_fraction": batch.all_wrong / batch.generated,
                "reward": batch.mean_reward,
            }
        for name, value in values.items():
            self._metrics["train"][f"dynamic_sampling/{name}"].append(value)

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

    def _log_engine_mismatch(self, generation, fresh=True):
        """Log |log π_engine - log π_old| of the scored tokens, where an engine such as vLLM reported the former.

        Completions that are not `fresh` (B,) were sampled from an earlier policy and tell nothing about the engine.

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
        if fresh is not True:
            scored = scored & fresh.unsqueeze(1)
        mismatch = (engine_logps - old_logps).abs()
        known = scored & mismatch.isfinite()
        mismatch = mismatch.masked_fill(~known, 0.0)
        local = torch.stack([mismatch.sum(), known.sum(), (scored & ~known).sum(), mismatch.max()])
        gathered = self.accelerator.gather(local.unsqueeze(0))  # (ranks, 4)
        total, tokens, nan_tokens, _ = gathered.sum(dim=0).tolist()
        mean = total / max(tokens, 1.0)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["engine_mismatch/mean"].append(mean)
        metrics["engine_mismatch/max"].append(gathered[:, 3].max().item())
        metrics["engine_mismatch/nan_tokens"].append(nan_tokens)
        if mean > ENGINE_MISMATCH_BOUND and not self._mismatch_explained:
            self._mismatch_explained = True
            logger.warning(
                f"engine_mismatch/mean={mean:.3f} nats per token is above {ENGINE_MISMATCH_BOUND}: the engine "
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

    # The loss, and what it shows of the policy

    def _compute_loss(self, model, inputs):
        if not self.model.training:  # evaluation completions come from the policy itself: every ratio would be 1
            return super()._compute_loss(model, inputs)
        seen = len(self._update_statistics)
        # A copy, because TRL reuses its buffered micro-batches when num_iterations > 1: weights must not compound
        self._loss_inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
        finally:
            self._loss_inputs = None
        if len(self._update_statistics) == seen:
            raise RuntimeError(
                "GRPOTrainer._compute_loss did not ask for log-probabilities through "
                "_get_per_token_logps_and_entropies, so no influence weight was applied. This version of TRL is not "
                "supported; see setup.cfg for those that are."
            )
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        log_probs = super()._get_per_token_logps_and_entropies
        if self._loss_inputs is None:  # old and reference log-probs
            if self.args.group_by_length:
                return log_probs_by_length(log_probs, *args, **kwargs)
            return log_probs(*args, **kwargs)
        outputs = log_probs(*args, **kwargs)
        statistics = self._weight_advantages(self._loss_inputs, outputs[0].detach())
        self._update_statistics.append(torch.stack([value.float() for value in statistics]))
        return outputs

    def _weight_advantages(self, inputs, per_token_logps) -> PolicyStatistics:
        """Called before the loss reads `inputs["advantages"]`, which a subclass may change. DAPO only looks."""
        log_ratio, mask = self._log_ratio(inputs, per_token_logps)
        return policy_statistics(log_ratio, inputs["advantages"], mask, dual_clip=self.args.delta)

    def _log_ratio(self, inputs, per_token_logps) -> tuple[torch.Tensor, torch.Tensor]:
        """log π_θ - log π_old, and where it is scored: both (B, T)."""
        mask = inputs["completion_mask"]  # (B, T)
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        old_per_token_logps = inputs.get("old_per_token_logps")
        if old_per_token_logps is None:  # TRL omits them where the policy is still the one that generated
            old_per_token_logps = per_token_logps
        return per_token_logps - old_per_token_logps, mask

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            statistics = torch.stack(self._update_statistics)
            self._update_statistics = []
            self._finish_update(self.accelerator.gather(statistics))
        return loss

    def _finish_update(self, statistics: torch.Tensor):
        """Reduce the statistics of an update, (ranks * micro-batches, statistics), and log them."""
        total = PolicyStatistics(*statistics.sum(dim=0).tolist())
        if total.tokens > 0:
            self._log_policy(total)

    def _log_policy(self, total):
        self._metrics["train"]["policy/kl"].append(total.policy_kl / total.tokens)
        self._metrics["train"]["policy/dual_clip_fraction"].append(total.dual_clipped / total.tokens)

    # Metrics of every row

    def _log_generation(self, generation):
        texts = self.processing_class.batch_decode(generation["completion_ids"], skip_special_tokens=True)
        metrics = self._metrics["train" if self.model.training else "eval"]
        patterns = self.args.derivation_pattern, self.args.self_check_pattern
        for name, value in generation_metrics(generation, texts, *patterns, self.accelerator).items():
            metrics[name].append(value)

    def log(self, logs, *args, **kwargs):
        logs.update(counters(self.state.global_step, self.args))
        super().log(logs, *args, **kwargs)

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
        """Save, too, where this rank stands in its generation, completions still in use, metrics not yet logged."""
        super()._save_optimizer_and_scheduler(output_dir)
        mid_generation = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        state = {
            "layout": self._generation_layout(),
            "step": self._step,
            "buffered_inputs": self._buffered_inputs if mid_generation else None,
            "dynamic_sampling": self._dynamic_sampler.state_dict() if self._dynamic_sampler else None,
            "metrics": {name: list(map(float, values)) for name, values in self._metrics["train"].items()},
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

        state = self._read_generation_state(checkpoint)
        # All processes must go on alike: a single one without its state would generate while the others train
        continued = all(gather_object([state is not None and state["layout"] == self._generation_layout()]))
        if continued:
            self._step = state["step"]
            self._buffered_inputs = send_to_device(state["buffered_inputs"], self.accelerator.device)
            self._metrics["train"].update(state["metrics"])
        else:
            logger.warning(
                f"{checkpoint} holds no generation state for these processes and batch layout: the run goes on with a "
                "new generation, and may see other completions than an uninterrupted run."
            )
        if self._dynamic_sampler is not None:
            self._load_dynamic_sampler(state, continued)

    def _read_generation_state(self, checkpoint) -> dict | None:
        path = os.path.join(checkpoint, GENERATION_STATE_NAME.format(rank=self.args.process_index))
        return torch.load(path, map_location="cpu", weights_only=True) if os.path.isfile(path) else None

    def _load_dynamic_sampler(self, state: dict | None, continued: bool):
        """Groups carried over lie on the processes that sampled them: another layout samples their prompts anew."""
        saved = state and state["dynamic_sampling"]
        if not continued:
            (saved,) = broadcast_object_list([saved])  # the main process's
            if saved and saved["pool"]:
                saved = saved | {"position": saved["pool"][0]["position"], "pool": []}
        if saved is None or saved["rows"] != self._dynamic_sampler.stream.rows:
            logger.warning(
                "The checkpoint was saved without dynamic sampling, or with another dataset: prompts start anew."
            )
            return
        self._dynamic_sampler.load_state_dict(saved)

    def _generation_layout(self) -> dict:
        """What must not change if a generation is to be continued."""
        names = (
            "world_size",
            "per_device_train_batch_size",
            "steps_per_generation",
            "num_iterations",
            "num_generations",
        )
        return {name: getattr(self.args, name) for name in names}
