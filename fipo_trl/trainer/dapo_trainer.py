"""DAPOTrainer: TRL's GRPOTrainer with what long DAPO and FIPO runs need beside the loss. The loss is TRL's.

It reads as a list of the methods of TRL that are overridden. The work is done elsewhere: groups that are sampled ahead
(`rollouts.py`, by the rules of `dynamic_sampling.py`), micro-batches without padding (`length_grouping.py`), checks of
the engine (`engine.py`), the client of its server (`vllm_server.py`), LoRA adapters for it (`lora_sync.py`), the scope
of a loss (`loss_scope.py`), checks of rewards (`reward_calls.py`), a checkpoint of what fails (`last_update.py`),
exact resuming (`resume.py`), metrics (`metrics.py`).
"""

import inspect
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.import_utils import is_vllm_available
from trl.trainer.utils import get_config_model_id

from fipo_trl.engines import vllm_cpu
from fipo_trl.objective.influence import InfluenceStatistics, PolicyStatistics, policy_statistics
from fipo_trl.trainer.dapo_config import DAPOConfig
from fipo_trl.trainer.dynamic_sampling import DynamicSampler
from fipo_trl.trainer.engine import EngineMismatch, check_base, check_ends
from fipo_trl.trainer.last_update import LastUpdate
from fipo_trl.trainer.length_grouping import LengthGrouping, log_probs_by_length
from fipo_trl.trainer.lora_sync import adapter_sync
from fipo_trl.trainer.loss_scope import LossScope
from fipo_trl.trainer.manifest import (
    Changes,
    announce_changes,
    begin_checkpoint,
    fingerprint,
    set_learning_rate,
    write_manifest,
)
from fipo_trl.trainer.metrics import counters, decoded_texts, generation_metrics
from fipo_trl.trainer.prompts import check_prompts
from fipo_trl.trainer.resume import dtypes_kept, resolve, restore_generation, save_generation
from fipo_trl.trainer.reward_calls import RewardCalls
from fipo_trl.trainer.rollouts import GroupRollouts
from fipo_trl.trainer.sharding import check_models_are_loaded
from fipo_trl.trainer.trl_contract import check_attributes, check_contract
from fipo_trl.trainer.vllm_server import server_client


logger = get_logger(__name__)


class DAPOTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with DAPO's scaffold, and the control arm of [`FIPOTrainer`], which adds the weights to it.

    With `dynamic_sampling=False` and `group_by_length=False` it trains the weights that `GRPOTrainer` trains, bit for
    bit.

    Args:
        model, reward_funcs, train_dataset, ...:
            As for [`~trl.GRPOTrainer`].
        args ([`DAPOConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration of this trainer. A [`~trl.GRPOConfig`] is promoted, see [`DAPOConfig.from_grpo_config`], and
            the values adopted are logged. If `None`, a default [`DAPOConfig`] is used.
    """

    _tag_names = ["trl", "dapo"]
    _name = "DAPO"
    _config_class: type[DAPOConfig] = DAPOConfig
    # TRL's
    reward_funcs: list[Any]
    _buffered_inputs: Any

    def __init__(self, model, reward_funcs=None, args: GRPOConfig | None = None, *positional, **keywords):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            output_dir = f"{model_id.split('/')[-1]}-{self._name}"
            args = self._config_class(output_dir, use_cpu=not torch.accelerator.is_available())
        elif not isinstance(args, GRPOConfig) or getattr(args, "method", self._name) != self._name:
            raise TypeError(
                f"args must be a {self._config_class.__name__} or a GRPOConfig, got {type(args).__name__}."
            )
        check_contract()
        given = args
        adopted: dict[str, Any] = {}
        if not isinstance(args, DAPOConfig):
            args, adopted = self._config_class.from_grpo_config(args)
        if args.use_vllm and args.vllm_mode == "colocate" and is_vllm_available():
            vllm_cpu.refuse_untested_version()

        self._train_sampler = None  # TRL's; None for iterable datasets
        self._rewards_per_function: Any = None  # (rows of all processes, F), of the completions just scored
        self._completions: list[Any] = []  # just scored, as TRL decoded them
        self._loss_scope = LossScope()
        self._changes: Changes | None = None  # of a run that was resumed
        self._group_rollouts: GroupRollouts | None = None
        bound = inspect.signature(super().__init__).bind_partial(model, reward_funcs, args, *positional, **keywords)
        check_prompts(bound.arguments.get("train_dataset"), bound.arguments.get("processing_class"))
        check_models_are_loaded(args, model, reward_funcs, bound.arguments.get("peft_config"))
        check_base(args, model, bound.arguments.get("quantization_config"))
        with server_client(), adapter_sync(merge=args.vllm_merge_lora):
            super().__init__(*bound.args, **bound.kwargs)
        check_attributes(self)
        self._reward_calls = RewardCalls(
            self.reward_funcs, self.reward_func_names, args.reward_timeout, args.reward_timeout_action
        )
        self.reward_funcs = self._reward_calls.functions
        self._last_update = LastUpdate(self)
        self.add_callback(self._last_update)
        check_ends(self)
        warn_of_dropout(self.model)
        truncated = args.top_p < 1.0 or args.top_k > 0 or bool(args.min_p)
        self._engine_mismatch = EngineMismatch(self.accelerator, truncated)
        self._length_grouping = LengthGrouping(args.gradient_accumulation_steps, self._what_ties_rows())
        if args.dynamic_sampling:
            self._group_rollouts = GroupRollouts(self)
        if adopted:
            tell_promotion(given, args, adopted)

    @property
    def dynamic_sampler(self) -> DynamicSampler | None:
        """What fills the generation batches, with `dynamic_sampling=True`."""
        return self._group_rollouts.sampler if self._group_rollouts else None

    # A prompt becomes groups

    def _generate_and_score_completions(self, inputs):
        generate_and_score, fresh = super()._generate_and_score_completions, None
        if self._group_rollouts is None or not self.model.training:
            outputs = generate_and_score(inputs)
            compare = True
        else:
            outputs, fresh = self._group_rollouts.generate(generate_and_score)
            compare = fresh is not None
        if compare:
            self._log_metrics(self._engine_mismatch.measure(outputs, fresh))
        self._log_generation(outputs)
        return outputs

    def _calculate_rewards(self, inputs, prompts, completions, *args, **kwargs):
        self._completions = completions
        replayed = self._group_rollouts.replayed_rewards if self._group_rollouts else None
        if replayed is None:
            self._rewards_per_function = super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)
            self._reward_calls.finish(self._rewards_per_function, self.accelerator)
        else:
            self._rewards_per_function = replayed
        return self._rewards_per_function

    # Groups become micro-batches

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.args.group_by_length and self._buffered_inputs is not before:  # a new generation
            self._buffered_inputs = self._length_grouping(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _what_ties_rows(self) -> list[str]:
        """What makes the loss of a row depend on the other rows of its micro-batch."""
        spans = self.args.steps_per_generation % self.args.gradient_accumulation_steps != 0
        ties = {
            "loss_type='bnpo'": self.loss_type == "bnpo",
            "an entropy bonus": self._entropy_bonus_enabled,
            "top_entropy_quantile < 1": self.top_entropy_quantile < 1.0,
            "the router's auxiliary loss": self.aux_loss_enabled,
            "updates that span two generations": spans,
        }
        return [reason for reason, applies in ties.items() if applies]

    # Micro-batches become a loss

    def _compute_loss(self, model, inputs):
        if not self.model.training:  # evaluation completions come from the policy itself: every ratio would be 1
            return super()._compute_loss(model, inputs)
        with self._loss_scope.open(inputs) as copied:
            return super()._compute_loss(model, copied)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        log_probs = super()._get_per_token_logps_and_entropies
        if self._loss_scope.inputs is not None:
            outputs = log_probs(*args, **kwargs)
            self._loss_scope.statistics.append(self._weight_advantages(outputs[0].detach()))
            return outputs
        if self.args.group_by_length:  # old and reference log-probs
            return log_probs_by_length(log_probs, *args, **kwargs)
        return log_probs(*args, **kwargs)

    def _weight_advantages(self, per_token_logps: Tensor) -> PolicyStatistics | InfluenceStatistics:
        """Called before the loss reads the advantages of its scope's inputs, which a subclass may change.

        DAPO only looks.
        """
        log_ratio, mask = self._loss_scope.log_ratio(per_token_logps)
        advantages = self._loss_scope.inputs["advantages"]
        return policy_statistics(log_ratio, advantages, mask, dual_clip=self.args.delta)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            total = self._loss_scope.total(self.accelerator.gather)
            if total.tokens > 0:
                self._finish_update(total)
        return loss

    def _finish_update(self, total: PolicyStatistics | InfluenceStatistics):
        """Called before the gradients of an update are clipped, with its statistics over all processes."""
        self._log_metrics(
            {
                "policy/kl": total.policy_kl / total.tokens,
                "policy/dual_clip_fraction": total.dual_clipped / total.tokens,
            }
        )

    # Metrics

    def _log_metrics(self, metrics: dict[str, float]):
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _log_generation(self, generation):
        texts = decoded_texts(self._completions, self._tokenizer)
        if texts is None:
            texts = self.processing_class.batch_decode(generation["completion_ids"], skip_special_tokens=True)
        patterns = self.args.derivation_pattern, self.args.self_check_pattern
        self._log_metrics(generation_metrics(generation, texts, *patterns, self.accelerator))

    def log(self, logs, *args, **kwargs):
        logs.update(counters(self.state.global_step, self.args))
        super().log(logs, *args, **kwargs)

    # Data

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

    @cached_property
    def data_fingerprint(self) -> dict | None:
        """Of the training data, for [`fipo_trl.trainer.manifest`]."""
        return fingerprint(self.train_dataset)

    # Failing and resuming

    @property
    def inside_generation(self) -> bool:
        """Whether completions of the generation at hand are still to be trained on."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        checkpoint = resolve(self, resume_from_checkpoint)
        self._changes = announce_changes(self, checkpoint) if checkpoint else None
        with self._last_update.saved_on_failure():
            return super().train(checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:  # transformers would make one update more than there are
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._last_update.remember()

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with self._last_update.saving():
            begin_checkpoint(self, folder)
            super()._save_checkpoint(model, trial)
            write_manifest(self, folder)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # next, the main process deletes older checkpoints

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        save_generation(self, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with dtypes_kept(self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            if self._changes and self._changes.learning_rate is not None:
                set_learning_rate(self, self._changes.learning_rate)
            restore_generation(self, checkpoint)

    # The model's card

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, *args, **kwargs):
        """TRL's, with the folder's name and the paths of model and data where the Hub knows no name for them."""
        output_dir, base = self.args.output_dir, get_config_model_id(self.model.config)
        local_data = dataset_name if dataset_name and os.path.exists(dataset_name) else None
        name = model_name or Path(self.hub_model_id or output_dir).name
        super().create_model_card(name, None if local_data else dataset_name, *args, **kwargs)
        card = Path(output_dir, "README.md")
        if self.is_world_process_zero():
            text = card.read_text()
            if not base or os.path.isdir(base):
                text = text.replace("[None](https://huggingface.co/None)", f"`{base}`" if base else "a model")
            if local_data:
                text = text.replace("\nIt has been trained", f"\nIt has been trained on `{local_data}`", 1)
            card.write_text(text.replace('model="None"', f'model="{os.path.normpath(output_dir)}"'))


def tell_promotion(given: GRPOConfig, args: DAPOConfig, adopted: dict[str, Any]):
    """Log what a promoted `GRPOConfig` has become: a line for each setting, and one for larger generations."""
    lines = [
        f"  {name}={value}" + (f"  (was {getattr(given, name)})" if hasattr(given, name) else "")
        for name, value in adopted.items()
        if not name.endswith("_pattern")
    ]
    settings = "\n".join(lines)
    logger.warning(
        f"GRPOConfig was promoted to {type(args).__name__}. Settings left at TRL's defaults became:\n{settings}"
    )
    if args.generation_batch_size != given.generation_batch_size:
        logger.warning(
            f"completions per generation: {given.generation_batch_size} -> {args.generation_batch_size}, for "
            f"{args.updates_per_generation:g} updates of {given.generation_batch_size} in place of 1. Set "
            "steps_per_generation or generation_batch_size to choose otherwise."
        )


def warn_of_dropout(model: torch.nn.Module):
    """π_old and π_θ would draw different masks, and differ where the weights are the same."""
    dropout = max((layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)), default=0.0)
    if dropout > 0:
        logger.warning(
            f"The model has dropout ({dropout:g}; lora_dropout is 0.05 by default in TRL). It puts noise into "
            "every log-ratio, also in the first update of a generation, and Future-KL sums it up. Set "
            "lora_dropout=0.0, or disable_dropout=True for all of the model."
        )
