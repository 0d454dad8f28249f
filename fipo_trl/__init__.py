"""FIPO (Future-KL Influenced Policy Optimization) for Hugging Face TRL."""

from fipo_trl.future_kl import future_kl
from fipo_trl.influence import InfluenceStatistics, InfluenceWeights, influence_weights


__version__ = "0.1.0.dev0"

__all__ = [
    "DAPOTrainer",
    "FIPOConfig",
    "FIPOTrainer",
    "InfluenceStatistics",
    "InfluenceWeights",
    "future_kl",
    "influence_weights",
]


def __getattr__(name):  # the mathematics needs torch alone; TRL is imported with the first name that needs it
    if name == "FIPOConfig":
        from fipo_trl.fipo_config import FIPOConfig

        return FIPOConfig
    if name == "DAPOTrainer":
        from fipo_trl.dapo_trainer import DAPOTrainer

        return DAPOTrainer
    if name == "FIPOTrainer":
        from fipo_trl.fipo_trainer import FIPOTrainer

        return FIPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
