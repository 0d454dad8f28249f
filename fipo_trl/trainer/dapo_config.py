"""The settings of DAPO's scaffold, which both trainers share, and their bounds."""

import math
import re
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from transformers.trainer_utils import SchedulerType
from trl import GRPOConfig

from fipo_trl.trainer.metrics import DERIVATION_PATTERN, SELF_CHECK_PATTERN


UPDATES_PER_GENERATION = 8  # gradient updates on each rollout batch in the paper's FIPO runs (512 prompts in 64s)
LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "bnpo")  # clipped per-token objectives: eq. 8, aggregated in various ways


@dataclass
class DAPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`DAPOTrainer`].

    [`DAPOConfig`] inherits every parameter from [`~trl.GRPOConfig`]. It adds those of DAPO's scaffold, and changes
    some defaults to those of the DAPO and FIPO papers (https://arxiv.org/abs/2503.14476,
    https://arxiv.org/abs/2603.19835).

    Parameters:
        > Parameters of dynamic sampling

        dynamic_sampling (`bool`, *optional*, defaults to `False`):
            Whether prompts whose completions all earn the same are replaced by others until the generation batch is
            full, before any log-probability is computed (DAPO, section 3.2). Prompts then come from an order of the
            dataset of this trainer's own, and an epoch counts the prompts trained on, not those sampled: set
            `max_steps`.
        dynamic_sampling_reward (`str`, *optional*):
            Name of the reward function whose values decide. Defaults to the first. In the paper it is the accuracy,
            not the reward shaped by length; a weight of 0 in `reward_weights` lets a function decide and no more.
        dynamic_sampling_oversample (`float` or `"auto"`, *optional*, defaults to `"auto"`):
            Prompts sampled in a round, in generation batches (the paper: 4.0 for FIPO, 3.0 for DAPO). `"auto"` sizes
            each round by what is missing and by the share of prompts kept so far.
        dynamic_sampling_max_rounds (`int`, *optional*, defaults to `10`):
            After so many rounds, the prompts found are filled up with others, whose advantages are 0, with a warning.
        dynamic_sampling_strict (`bool`, *optional*, defaults to `False`):
            Whether running out of rounds is an error.
        dynamic_sampling_carry_over (`bool`, *optional*, defaults to `False`):
            Whether prompts found beyond those that the batch needs come first in the next one, with their completions.
            These were sampled by the policy of one generation before, but are trained on as if the present one had
            sampled them: π_old is computed by the present policy. Otherwise their prompts are sampled anew.
        dynamic_sampling_skip (`bool`, *optional*, defaults to `False`):
            Whether prompts whose completions all earned the same at their latest visits are most likely skipped before
            anything is sampled: the more such visits in a row, the likelier (GRESO, https://arxiv.org/abs/2506.02177).
            For problems that differ in difficulty and are visited several times: it saves nothing in the first pass
            over the data, nor on problems that are all alike. The DAPO and FIPO papers' runs skip none.

        > Parameters of rewards

        reward_timeout (`float`, *optional*):
            Seconds that a call of a reward function may take. By default as long as it takes. With a timeout, a
            function that can be imported, or pickled, runs in a process of its own, which is killed when time is up:
            it sees copies of its arguments, and its random numbers and global variables are not those of the run. What
            it imports, once and again after each kill, does not count. Other functions (closures, lambdas, those that
            a script or notebook defines itself, those that are given environments) run in a thread, which cannot be
            killed: it is left behind, and may go on using memory, cores and what it shares with the next call. One
            that is asynchronous is cancelled where it awaits, and never if it does not await. Reward models have no
            timeout.
        reward_timeout_action (`str`, *optional*, defaults to `"nan"`):
            What becomes of a generation whose reward has not come: `"nan"`, its completions are not scored by this
            function, with a warning; or `"error"`, which ends training, with a checkpoint.

        > Parameters of monitoring

        derivation_pattern (`str`, *optional*):
            Regular expression for a step of a derivation, by which the metrics `behaviour/*` tell completions that
            derive their answer. Defaults to an equals sign and a number.
        self_check_pattern (`str`, *optional*):
            Regular expression for the beginning of a self-check, counted after the first such step. Defaults to
            English phrases: "wait", "let me verify", "another way", ...

        > Parameters of speed

        group_by_length (`bool`, *optional*, defaults to `True`):
            Whether the micro-batches of an optimizer update hold completions of similar length, cut to their own
            longest prompt and completion, in place of random ones padded to the longest of the whole generation. The
            update is the same up to rounding. Where the loss depends on which completions share a micro-batch, they
            are cut only; batches with images are left alone. The reason is logged.
        vllm_merge_lora (`bool`, *optional*, defaults to `False`):
            Whether a LoRA adapter is merged into the weights for vLLM, and all of them sent for every generation, as
            TRL does it. By default vLLM serves the base and gets the adapter alone: a faster sync, and slower
            sampling.

        > Inherited parameters with another default

        loss_type (`str`, *optional*, defaults to `"dapo"`):
            The clipped per-token objectives: `"dapo"`, `"grpo"`, `"dr_grpo"` and `"bnpo"`.
        epsilon (`float`, *optional*, defaults to `0.2`):
            Lower clip range of the probability ratio.
        epsilon_high (`float`, *optional*, defaults to `0.28`):
            Upper clip range of the probability ratio.
        delta (`float`, *optional*, defaults to `10.0`):
            Dual clip c: the ratio above which a token with a negative advantage has no gradient. Must be greater than
            `1 + epsilon_high`.
        beta (`float`, *optional*, defaults to `0.0`):
            No KL penalty, hence no reference model.
        lr_scheduler_type (`str` or [`~transformers.SchedulerType`], *optional*, defaults to `"constant_with_warmup"`):
            Constant learning rate after `warmup_steps` optimizer updates (0 by default).
        vllm_importance_sampling_correction (`bool`, *optional*, defaults to `False`):
            No correction of the mismatch between vLLM and the trainer, as in the paper's runs. TRL's default
            correction removes whole sequences, long ones first.
        steps_per_generation (`int`, *optional*):
            Micro-steps per generation. Defaults to `8 * gradient_accumulation_steps` if `generation_batch_size` is not
            set either: 8 gradient updates per generation.
    """

    method: ClassVar[str] = "DAPO"  # a trainer takes the configuration of its own method only

    dynamic_sampling: bool = field(
        default=False,
        metadata={
            "help": "Whether prompts whose completions all earn the same are replaced by others until the generation "
            "batch is full (DAPO). Set max_steps: an epoch then counts the prompts trained on."
        },
    )
    dynamic_sampling_reward: str | None = field(
        default=None,
        metadata={"help": "Name of the reward function whose values decide. Defaults to the first."},
    )
    dynamic_sampling_oversample: str = field(
        default="auto",
        metadata={
            "help": "Prompts sampled in a round, in generation batches (paper: 4.0 for FIPO, 3.0 for DAPO); 'auto' "
            "goes by what is missing and by the share of prompts kept so far."
        },
    )
    dynamic_sampling_max_rounds: int = field(
        default=10,
        metadata={"help": "After so many rounds, others with advantages of 0 fill the batch, with a warning."},
    )
    dynamic_sampling_strict: bool = field(
        default=False, metadata={"help": "Whether running out of rounds is an error."}
    )
    dynamic_sampling_carry_over: bool = field(
        default=False,
        metadata={
            "help": "Whether surplus prompts come first in the next batch, with their completions, which are then one "
            "generation older."
        },
    )
    dynamic_sampling_skip: bool = field(
        default=False,
        metadata={
            "help": "Whether prompts whose completions all earned the same at their latest visits are most likely "
            "skipped before anything is sampled (GRESO). For problems that differ in difficulty and are visited "
            "several times."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a call of a reward function may take, in a process of its own if it can be imported "
            "there, else in a thread, which cannot be killed. None: as long as it takes."
        },
    )
    reward_timeout_action: str = field(
        default="nan",
        metadata={
            "help": "What a timeout of a reward gives: 'nan' (its completions are not scored, with a warning) or "
            "'error'."
        },
    )
    derivation_pattern: str = field(
        default=DERIVATION_PATTERN,
        metadata={"help": "Regular expression for a step of a derivation, for the metrics behaviour/*."},
    )
    self_check_pattern: str = field(
        default=SELF_CHECK_PATTERN,
        metadata={"help": "Regular expression for the beginning of a self-check, for the metrics behaviour/*."},
    )
    group_by_length: bool = field(
        default=True,
        metadata={
            "help": "Whether micro-batches hold completions of similar length and are cut to their own longest one: "
            "the same update, without the padding."
        },
    )
    vllm_merge_lora: bool = field(
        default=False,
        metadata={
            "help": "Whether a LoRA adapter is merged into the weights for vLLM, as TRL does it. By default it "
            "gets the adapter alone: a faster sync, and slower sampling."
        },
    )

    loss_type: str = field(
        default="dapo",
        metadata={"help": "Aggregation of the per-token objective: 'dapo', 'grpo', 'dr_grpo' or 'bnpo'."},
    )
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip range of the probability ratio."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip range of the probability ratio."})
    delta: float | None = field(
        default=10.0,
        metadata={
            "help": "Dual clip c, and in FIPO the ratio above which a token takes no part in Future-KL. Must be "
            "greater than 1 + epsilon_high."
        },
    )
    beta: float = field(default=0.0, metadata={"help": "KL coefficient. 0 needs no reference model."})
    lr_scheduler_type: SchedulerType | str = field(
        default="constant_with_warmup",
        metadata={"help": "The learning rate scheduler type to use. See `SchedulerType` for all possible values."},
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Whether to correct for the mismatch between vLLM's and the trainer's log-probabilities. If you "
            "switch it on, set vllm_importance_sampling_mode='token_truncate'."
        },
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Micro-steps per generation. If neither this nor generation_batch_size is set, it is "
            "8 * gradient_accumulation_steps: 8 gradient updates per generation."
        },
    )

    def __post_init__(self):
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = UPDATES_PER_GENERATION * self.gradient_accumulation_steps
        super().__post_init__()
        self._check()

    @classmethod
    def from_grpo_config(cls, args: GRPOConfig) -> tuple[Self, dict[str, Any]]:
        """Promote a `GRPOConfig`: settings left at TRL's defaults adopt those of this class.

        A setting that was written out with the value of TRL's default cannot be told from one that was left alone,
        and adopts the default of this class too. Batch settings that give more than one update per generation are
        never changed; where they give one, `steps_per_generation` and `generation_batch_size` grow to give 8.

        Returns:
            The new configuration (`args` is not touched), and a dict of the values adopted, `{name: value}`, without
            those of dynamic sampling and token credit, which stay off.

        Raises:
            ValueError: if the result is not valid.
        """
        # TrainingArguments.__post_init__ rewrites its own fields and cannot be run on the result, so no constructor
        config = object.__new__(cls)
        config.__dict__.update(args.__dict__)
        theirs = {f.name: f.default for f in fields(GRPOConfig)}
        adopted = {
            f.name: f.default
            for f in fields(cls)
            if f.name not in theirs or (f.default != theirs[f.name] and getattr(args, f.name) == theirs[f.name])
        }
        if args.steps_per_generation * args.num_iterations == args.gradient_accumulation_steps:
            adopted["steps_per_generation"] = UPDATES_PER_GENERATION * args.gradient_accumulation_steps
            adopted["generation_batch_size"] = UPDATES_PER_GENERATION * args.generation_batch_size
        config.__dict__.update(adopted)
        config.lr_scheduler_type = SchedulerType(config.lr_scheduler_type)
        config._check()
        unsaid = ("dynamic_sampling", "token_credit", "reward_timeout", "vllm_merge_lora")
        return config, {name: value for name, value in adopted.items() if not name.startswith(unsaid)}

    @property
    def updates_per_generation(self) -> float:
        """Gradient updates made on each generation batch."""
        return self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps

    def _check(self):
        """Refuse what would train something else than what was asked for, before any GPU time is spent."""
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type='{self.loss_type}' is not supported: DAPO and FIPO optimize a clipped per-token "
                f"objective. Set loss_type to 'dapo' (the paper's), or to one of {', '.join(LOSS_TYPES[1:])}."
            )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level='{self.importance_sampling_level}' is not supported: DAPO and FIPO clip "
                "the probability ratio of each token. Set importance_sampling_level='token'."
            )
        epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is None or not self.delta > 1 + epsilon_high:
            raise ValueError(
                f"delta={self.delta} must be greater than 1 + epsilon_high = {1 + epsilon_high:g}: it is the dual "
                "clip c (and in FIPO the ratio above which a token takes no part in Future-KL); training is unstable "
                "without. Set delta=10.0 (the paper's)."
            )
        self._check_dynamic_sampling()
        self._check_patterns()
        self._check_reward_timeout()
        if self.lr_scheduler_type == SchedulerType.CONSTANT and self.warmup_steps > 0:
            raise ValueError(
                f"lr_scheduler_type='constant' ignores warmup_steps={self.warmup_steps:g}. Set "
                "lr_scheduler_type='constant_with_warmup', or warmup_steps=0."
            )
        if self.vllm_merge_lora and not self.use_vllm:
            raise ValueError("vllm_merge_lora=True does nothing without vLLM. Remove it, or set use_vllm=True.")
        context = self.vllm_max_model_length
        if self.use_vllm and context is not None and context <= self.max_completion_length:
            raise ValueError(
                f"vllm_max_model_length={context} leaves no room for a prompt beside max_completion_length="
                f"{self.max_completion_length}: vLLM would cut every long completion short. Set vllm_max_model_length "
                "to at least max_completion_length plus the length of the longest prompt."
            )
        if (
            self.use_vllm
            and self.vllm_importance_sampling_correction
            and self.vllm_importance_sampling_mode.startswith("sequence")
        ):
            warnings.warn(
                f"vllm_importance_sampling_mode='{self.vllm_importance_sampling_mode}' multiplies the ratios of all "
                "tokens of a completion, so that small differences between vLLM and the trainer add up and long "
                "answers are masked away or shrunk. Set vllm_importance_sampling_mode='token_truncate', or "
                "vllm_importance_sampling_correction=False as in the paper's runs.",
                stacklevel=3,
            )

    def _check_reward_timeout(self):
        if self.reward_timeout is not None and not 0.0 < self.reward_timeout < math.inf:
            raise ValueError(
                f"reward_timeout={self.reward_timeout} must be a number of seconds greater than 0. To wait as long as "
                "it takes, remove it."
            )
        if self.reward_timeout_action not in ("nan", "error"):
            raise ValueError(f"reward_timeout_action='{self.reward_timeout_action}' must be 'nan' or 'error'.")
        if self.reward_timeout is None and self.reward_timeout_action != "nan":
            raise ValueError(
                f"reward_timeout_action='{self.reward_timeout_action}' does nothing without reward_timeout. Set that, "
                "or remove it."
            )

    def _check_patterns(self):
        for name in ("derivation_pattern", "self_check_pattern"):
            pattern = getattr(self, name)
            try:
                matches_nothing = re.search(pattern, "") is not None
            except re.error as error:
                raise ValueError(f"{name}='{pattern}' is not a regular expression: {error}. Mend it.") from error
            if matches_nothing:
                raise ValueError(
                    f"{name}='{pattern}' matches the empty text, and so everywhere. Name what a text must hold, or "
                    "leave the setting out."
                )

    def _check_dynamic_sampling(self):
        if not self.dynamic_sampling:
            for f in fields(DAPOConfig):
                if f.name.startswith("dynamic_sampling_") and getattr(self, f.name) != f.default:
                    raise ValueError(
                        f"{f.name}={getattr(self, f.name)} does nothing without dynamic_sampling=True. Set that, or "
                        "remove it."
                    )
            return
        if self.dynamic_sampling_oversample != "auto":
            try:
                factor = float(self.dynamic_sampling_oversample)
            except ValueError:
                factor = math.nan
            if not 1.0 <= factor < math.inf:
                raise ValueError(
                    f"dynamic_sampling_oversample={self.dynamic_sampling_oversample} must be 'auto' or a factor of at "
                    "least 1: a round samples so many generation batches of prompts. Set 'auto', 4.0 (the paper's "
                    "FIPO runs) or 3.0 (DAPO)."
                )
            self.dynamic_sampling_oversample = factor  # type: ignore[assignment]  # argparse knows no str | float
        if self.dynamic_sampling_max_rounds < 1:
            raise ValueError(
                f"dynamic_sampling_max_rounds={self.dynamic_sampling_max_rounds} must be at least 1. Set 10 (the "
                "paper's)."
            )
