"""Trainers by the names that a recipe gives them: which class, and the settings that it reads."""

from typing import TYPE_CHECKING

from fipo_trl.rewards.names import find
from fipo_trl.trainer.dapo_config import DAPOConfig
from fipo_trl.trainer.fipo_config import FIPOConfig


if TYPE_CHECKING:  # imported when it is needed: it takes seconds
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer


CONFIGS: dict[str, type[DAPOConfig]] = {"fipo": FIPOConfig, "dapo": DAPOConfig}


def config_class_of(name: str, folder: str | None = None) -> type[DAPOConfig]:
    """The configuration whose settings a trainer reads. Only a class of one's own is imported for it.

    Arguments and errors are those of [`find_trainer`].
    """
    return CONFIGS[name] if name in CONFIGS else find_trainer(name, folder)._config_class


def find_trainer(name: str, folder: str | None = None) -> "type[DAPOTrainer]":
    """The class of a trainer: "fipo", "dapo", or the import path of a subclass of `DAPOTrainer`.

    Args:
        name: As a recipe has it.
        folder: Where modules are looked for after the working directory.

    Raises:
        ValueError: if there is no such class, or it is not one of these.
    """
    if name not in CONFIGS and "." not in name:
        raise ValueError(
            f"'trainer' must be one of {', '.join(CONFIGS)}, or an import path such as my_module.MyTrainer, got "
            f"{name}."
        )
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer
    from fipo_trl.trainer.fipo_trainer import FIPOTrainer

    if name in CONFIGS:
        return {"fipo": FIPOTrainer, "dapo": DAPOTrainer}[name]
    try:
        found = find(name, folder)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"trainer: cannot load '{name}' ({error}). Give fipo, dapo, or an import path such as "
            "my_module.MyTrainer, looked for in the directory you start from, then in the recipe's folder."
        ) from error
    if not (isinstance(found, type) and issubclass(found, DAPOTrainer)):
        raise ValueError(
            f"trainer: '{name}' is not a subclass of fipo_trl.DAPOTrainer. Derive it from that, or from FIPOTrainer."
        )
    return found
