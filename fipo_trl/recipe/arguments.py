"""Settings of a run that are neither TRL's nor the trainer's: which trainer, DAPO's data and rewards, evaluation."""

import json
from dataclasses import dataclass, field
from typing import Literal

from trl.scripts.grpo import GRPOScriptArguments


@dataclass
class RunArguments(GRPOScriptArguments):
    """TRL's arguments of its GRPO script, the choice of the trainer, and settings of DAPO's data and rewards."""

    trainer: str = field(
        default="fipo",
        metadata={
            "help": "'fipo', or 'dapo': the loss of TRL's GRPOTrainer, and all else the same: the control arm. It "
            "reads no setting of FIPO. Or module.Class, of your own, derived from one of the two."
        },
    )
    dataset_settings: dict | str | None = field(
        default=None,
        metadata={
            "help": "Settings of the task that dataset_name='reasoning_gym/<task>' names, as JSON: size, test_size, "
            "seed, and the task's own."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of more tokens are left out. For data in the schema of DAPO-Math-17k and for "
            "reasoning_gym/<task>."
        },
    )
    on_collapse: Literal["warn", "stop"] = field(
        default="warn",
        metadata={
            "help": "What to do when the run shows the signature of a collapse: 'warn' with the numbers, or also "
            "'stop'. Either saves a checkpoint."
        },
    )
    overlong_buffer: int | None = field(
        default=None,
        metadata={
            "help": "Tokens before max_completion_length over which the reward 'overlong_penalty' falls from 0 to -1. "
            "Default: a fifth of it, as in DAPO."
        },
    )
    allow_unsandboxed: bool = field(
        default=False,
        metadata={
            "help": "Whether rewards that run programs of the model (code_reward) may do so where no sandbox can be "
            "had, as the user who trains."
        },
    )
    eval_problems: list[str] | None = field(
        default=None,
        metadata={
            "help": "Problems to evaluate on before the first update, every eval_steps updates and after the last, "
            "beside TRL's own evaluation (eval_strategy): aime24, aime25, a folder, file or Hub id, "
            "reasoning_gym/<task> (with dataset_settings where it is dataset_name), or NAME=SOURCE."
        },
    )
    eval_samples: int = field(default=32, metadata={"help": "Samples per problem of eval_problems: n of avg@n."})
    eval_temperature: float = field(default=1.0, metadata={"help": "Temperature of these samples."})
    eval_top_p: float = field(default=0.7, metadata={"help": "Top-p of these samples; the paper trains at 1.0."})
    eval_reward: str = field(
        default="dapo_accuracy",
        metadata={"help": "Reward function, named as in reward_funcs, that gives 1 where an answer is right, or 0."},
    )

    def __post_init__(self):
        if self.dataset_settings is not None:
            self.dataset_settings = as_mapping(self.dataset_settings)

    @property
    def task_settings(self) -> dict[str, dict]:
        """`dataset_settings` by the name of the task that they are for."""
        return {} if self.dataset_settings is None else {self.dataset_name: as_mapping(self.dataset_settings)}


def as_mapping(settings: dict | str, setting: str = "dataset_settings") -> dict:
    """A mapping, or its JSON as the command line gives it.

    Raises:
        ValueError: if it is not one.
    """
    try:
        mapping = json.loads(settings) if isinstance(settings, str) else settings
    except ValueError as error:
        raise ValueError(f"{setting}={settings} is not valid JSON: {error}.") from error
    if not isinstance(mapping, dict):
        raise ValueError(f'{setting}={settings} must be a mapping, such as {{"size": 2000}}.')
    return mapping
