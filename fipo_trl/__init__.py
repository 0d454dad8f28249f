"""FIPO (Future-KL Influenced Policy Optimization) and DAPO for Hugging Face TRL."""

import importlib
import logging
from typing import TYPE_CHECKING

from fipo_trl.objective.future_kl import future_kl
from fipo_trl.objective.influence import influence_weights


if TYPE_CHECKING:
    from fipo_trl.trainer.dapo_config import DAPOConfig
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer
    from fipo_trl.trainer.fipo_config import FIPOConfig
    from fipo_trl.trainer.fipo_trainer import FIPOTrainer


__version__ = "0.2.0"

__all__ = ["DAPOConfig", "DAPOTrainer", "FIPOConfig", "FIPOTrainer", "future_kl", "influence_weights"]

# PEFT imports bitsandbytes where it is installed, which on some CPUs warns of a kernel of the Hub that it did not get
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# The mathematics needs torch alone; TRL is imported with the first of these names
_OF_TRAINER = {
    "DAPOConfig": "dapo_config",
    "DAPOTrainer": "dapo_trainer",
    "FIPOConfig": "fipo_config",
    "FIPOTrainer": "fipo_trainer",
}


def __getattr__(name: str):
    if name in _OF_TRAINER:
        return getattr(importlib.import_module(f"fipo_trl.trainer.{_OF_TRAINER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
