"""The second step: what was written -> settings of the right types, within their bounds, that fit each other."""

import re
from dataclasses import dataclass

from trl import DatasetMixtureConfig, ModelConfig

from fipo_trl.data.reasoning_gym import is_task
from fipo_trl.evaluation.settings import check_evaluation
from fipo_trl.recipe.arguments import RunArguments
from fipo_trl.recipe.read import Parser, Written, read
from fipo_trl.trainer.dapo_config import DAPOConfig


@dataclass(frozen=True)
class Recipe:
    """The settings of a run.

    Attributes:
        run: Which trainer, data, rewards, evaluation.
        training: What the trainer reads: a `FIPOConfig`, or a `DAPOConfig` where it is DAPO.
        model: TRL's settings of the model, its quantization and its adapter.
        mixture: TRL's mixture of datasets.
        folder: Of the file, where rewards are looked for after the working directory.
        env: Environment variables to set before training.
        ignored: Settings of FIPO in the file, which the trainer does not read.
    """

    run: RunArguments
    training: DAPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    folder: str | None
    env: dict[str, str]
    ignored: tuple[str, ...]

    @property
    def eval_sampling(self) -> tuple[int, float, float]:
        """How the problems of `eval_problems` are sampled: n, temperature and top-p."""
        return self.run.eval_samples, self.run.eval_temperature, self.run.eval_top_p


def validate(written: Written, world_size: int | None = None) -> Recipe:
    """Make settings of what was written.

    Args:
        world_size: As if so many processes were there; `None` counts those that are.

    Raises:
        ValueError: for a value that cannot be converted, for every setting that the configuration refuses, and for one
            that does nothing beside the others.
    """
    config_class = written.config_class
    if world_size is not None:
        config_class = type(config_class.__name__, (config_class,), {"world_size": world_size})
    parser = Parser(config_class)
    recipe = written.recipe
    same = {"steps_per_generation", "generation_batch_size"}  # two ways to say one thing: only one may be set
    if same & written.given:
        recipe = {name: value for name, value in recipe.items() if name not in same}
    parser.set_defaults_with_config(**recipe)
    try:
        run, training, model, mixture, rest = parser.parse_args_into_dataclasses(
            list(written.flags), return_remaining_strings=True
        )
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"a setting has a value that it cannot take: {error}") from error
    except ValueError as error:
        named = re.match(r"argument --(\w+)", str(error))
        if named and named[1] in recipe.keys() - written.given:
            raise ValueError(f"{written.path}: {error}") from error
        raise
    if rest:
        raise ValueError(f"'{rest[0]}' is not understood. Flags start with two dashes; a recipe follows --config.")
    refuse_what_does_nothing(written.names, run, model)
    result = Recipe(run, training, model, mixture, written.folder, written.env, written.ignored)
    if run.eval_problems:
        check_evaluation(training.eval_steps, *result.eval_sampling)
    return result


def refuse_what_does_nothing(names: set[str], run: RunArguments, model: ModelConfig):
    """Raise a `ValueError` for a setting among `names` that no other one makes use of."""
    of_lora = sorted(name for name in names if name.startswith("lora_"))
    if of_lora and not model.use_peft:
        raise ValueError(f"'{of_lora[0]}' does nothing without use_peft: true. Set that, or remove it.")
    of_problems = {"eval_samples", "eval_temperature", "eval_top_p", "eval_reward"} & names
    if of_problems and not run.eval_problems:
        raise ValueError(f"'{min(of_problems)}' does nothing without eval_problems. Set that, or remove it.")
    if run.dataset_settings is not None and not is_task(run.dataset_name or ""):
        raise ValueError(
            f"'dataset_settings' does nothing with dataset_name={run.dataset_name}. It is for reasoning_gym/<task>: "
            "remove it."
        )


def read_and_validate(arguments: list[str], world_size: int | None = None) -> Recipe:
    """Both steps at once; see [`read`] and [`validate`]."""
    return validate(read(arguments), world_size)
