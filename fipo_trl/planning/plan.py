"""A recipe on the machines that it is meant for. No weight is loaded: models are built on torch's meta device."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from fipo_trl.data.reasoning_gym import check_task, is_task
from fipo_trl.recipe.arguments import RunArguments
from fipo_trl.recipe.build import rewards_of
from fipo_trl.recipe.model_limits import config_of, name_of_model
from fipo_trl.recipe.validate import Recipe, read_and_validate
from fipo_trl.trainer.dapo_config import DAPOConfig
from fipo_trl.trainer.fipo_config import FIPOConfig
from fipo_trl.trainer.lora_adapter import unserved_adapter


class Parameters(NamedTuple):
    """How many parameters a model has; with LoRA, its adapter included."""

    total: int
    trainable: int
    layer: int  # the largest repeated layer, the unit in which FSDP2 and ZeRO-3 gather
    embedding: int
    head: int  # 0 where it is tied to the embedding
    linear: int  # weights of linear layers, which autocast copies


@dataclass(frozen=True)
class Plan:
    """A recipe and the machines that it is meant for.

    Args:
        recipe: Validated for `world_size` processes.
        config: Of the language model.
        world_size: Number of processes, each with one GPU.
        sharding: How accelerate spreads the model over the processes.
        offload: Whether FSDP2 keeps weights, gradients and optimizer states in CPU memory.
        checkpointing: Whether FSDP2 checkpoints activations itself, in place of `gradient_checkpointing`.
    """

    recipe: Recipe
    config: PretrainedConfig
    world_size: int = 1
    sharding: Literal["none", "fsdp2", "zero3"] = "none"
    offload: bool = False
    checkpointing: bool = False

    @property
    def run(self) -> RunArguments:
        return self.recipe.run

    @property
    def training(self) -> DAPOConfig:
        return self.recipe.training

    @property
    def model(self) -> ModelConfig:
        return self.recipe.model

    @property
    def method(self) -> Literal["FIPO", "DAPO"]:
        return "FIPO" if isinstance(self.training, FIPOConfig) else "DAPO"

    @property
    def colocated(self) -> bool:
        """Whether vLLM shares the GPUs of training."""
        return self.training.use_vllm and self.training.vllm_mode == "colocate"

    @cached_property
    def meta_model(self):
        """The model, with its adapter, without its weights."""
        return meta_model(self.config, get_peft_config(self.model))

    @property
    def merged_adapter(self) -> bool:
        """Whether vLLM gets all weights, with a LoRA adapter merged into them, in place of the adapter alone."""
        if not self.model.use_peft or not self.training.use_vllm:
            return False
        return self.training.vllm_merge_lora or unserved_adapter(self.meta_model) is not None

    @property
    def engines(self) -> int:
        """Copies of vLLM that share a generation."""
        return max(1, self.world_size // self.training.vllm_tensor_parallel_size) if self.colocated else 1

    @property
    def oversampling(self) -> float:
        """Generation batches of prompts sampled per round, at least."""
        factor = self.training.dynamic_sampling_oversample
        return float(factor) if self.training.dynamic_sampling and factor != "auto" else 1.0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; prompts count where `max_prompt_length` bounds them."""
        return (self.run.max_prompt_length or 0) + self.training.max_completion_length

    @property
    def generations(self) -> float | None:
        """Rollout iterations of the whole run; `None` where epochs, not `max_steps`, bound it."""
        return self.training.max_steps / self.training.updates_per_generation if self.training.max_steps > 0 else None

    @cached_property
    def parameters(self) -> Parameters:
        return count_parameters(self.meta_model)

    @property
    def weight_bytes(self) -> float:
        """Bytes per parameter as the model is loaded."""
        if self.model.load_in_4bit:
            return 0.56  # 4 bits and a scale per block of 64
        if self.model.load_in_8bit:
            return 1
        dtype = self.model.dtype
        dtype = self.config.dtype if dtype == "auto" else getattr(torch, dtype or "float32")
        return (dtype or torch.float32).itemsize


def read_accelerate_config(path: str) -> dict:
    """`world_size`, `sharding`, `offload` and `checkpointing` of a YAML file of `accelerate config`."""
    with open(path) as file:
        config = yaml.safe_load(file)
    fsdp, deepspeed = config.get("fsdp_config") or {}, config.get("deepspeed_config") or {}
    kind = config.get("distributed_type")
    if kind == "FSDP" and fsdp.get("fsdp_version") != 2:
        raise ValueError(f"{path}: fsdp_version must be 2, got {fsdp.get('fsdp_version')}.")
    if kind == "DEEPSPEED" and deepspeed.get("zero_stage") != 3:
        raise ValueError(f"{path}: of DeepSpeed only zero_stage 3 is known here, got {deepspeed.get('zero_stage')}.")
    return {
        "world_size": config["num_processes"],
        "sharding": {"FSDP": "fsdp2", "DEEPSPEED": "zero3"}.get(kind, "none"),
        "offload": bool(fsdp.get("fsdp_offload_params", False)),
        "checkpointing": bool(fsdp.get("fsdp_activation_checkpointing", False)),
    }


def meta_model(config: PretrainedConfig, peft_config=None):
    """The model, with its adapter, without its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        return model if peft_config is None else get_peft_model(model, peft_config)


def count_parameters(model) -> Parameters:
    """Count those of a model, with its adapter; its weights are not read."""
    names = set(model._no_split_modules or [])
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return Parameters(
        total=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layer=max(
            (sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names), default=0
        ),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        linear=sum(m.weight.numel() for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D))),
    )


def make_plan(arguments: list[str], world_size: int, **spread) -> Plan:
    """Read a recipe as `world_size` processes would, on a machine that may have no GPU.

    Args:
        arguments: A command line of `fipo-trl train`.
        **spread: `sharding`, `offload` and `checkpointing` of the [`Plan`].

    Raises:
        ValueError: for what the recipe's first two steps refuse, for rewards that cannot be loaded, for a task of
            reasoning-gym or its settings that there are not, and for a model without a config.
    """
    without_gpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    recipe = read_and_validate([*arguments, *without_gpu], world_size)
    run = recipe.run
    name_of_model(recipe.model)
    rewards_of(recipe)
    if is_task(run.dataset_name or ""):
        check_task(run.dataset_name, run.task_settings.get(run.dataset_name))
    config = config_of(recipe.model, recipe.training.trust_remote_code)
    return Plan(recipe, config, world_size=world_size, **spread)
