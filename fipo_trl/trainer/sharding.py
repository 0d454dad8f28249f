"""What must be done otherwise where FSDP or DeepSpeed spreads a model over processes."""

import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import is_fsdp_enabled


if TYPE_CHECKING:
    from fipo_trl.trainer.dapo_config import DAPOConfig

# The gradient of an update, multiplied


def scale_gradients(model: nn.Module, factor: float):
    """Multiply what the backward passes of an update have left in the weights of one process, or of a shard."""
    if factor != 1.0:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def scale_whole_update(loss: Tensor, factor: float, engine: Any, args: "DAPOConfig") -> Tensor:
    """The same under DeepSpeed, which steps inside the backward pass of the last micro-batch.

    The gradient of that micro-batch is multiplied through its loss. Those of earlier ones lie summed up in the ZeRO
    optimizer, which divides the sum by its loss scale before it clips and steps: so a smaller scale multiplies them.
    It would shrink the last one, whose loss is multiplied by it too, if the loss did not make up for it.

    Args:
        loss: Of the last micro-batch, a scalar.
        engine: The `DeepSpeedEngine`. [`restore_loss_scale`] must follow its step.

    Returns:
        A loss of the same value, with the gradient multiplied.
    """
    if factor == 1.0:
        return loss
    if args.gradient_accumulation_steps > 1:
        engine.optimizer.override_loss_scale(engine.optimizer.loss_scale / factor)
    scaled = loss * factor
    return loss.detach() + (scaled - scaled.detach())


def restore_loss_scale(engine: Any):
    """Undo what [`scale_whole_update`] did to the optimizer of a `DeepSpeedEngine`, if it did."""
    if getattr(engine.optimizer, "custom_loss_scaler", False):
        engine.optimizer.custom_loss_scaler = False


# Checkpoints


def who_saves(args: "DAPOConfig") -> str:
    """Who writes the weights and the optimizer's states of a checkpoint, for people. No one else can read them."""
    if args.deepspeed_plugin is not None:
        return f"DeepSpeed's ZeRO-{args.deepspeed_plugin.zero_stage}"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        plugin = FullyShardedDataParallelPlugin()
        return f"FSDP{plugin.fsdp_version} with {plugin.state_dict_type.name}"
    return "processes that hold the whole model"


# Models that are there on the first process only


def check_models_are_loaded(args: "DAPOConfig", model: Any, reward_funcs: Any, peft_config: Any):
    """With `fsdp_cpu_ram_efficient_loading` the first process of a machine loads a model, the others zeros.

    accelerate then broadcasts the weights of the policy. TRL 1.16 shards a reference model as each process has it, and
    leaves a reward model as it is, so that all processes but the first would compare or score with zeros.

    Raises:
        ValueError: if there is such a model, before it is loaded.
    """
    if args.world_size == 1 or not is_fsdp_enabled():
        return
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    found = []
    if args.beta != 0.0 and peft_config is None and not isinstance(model, PeftModel):
        found.append(f"the reference model of beta={args.beta}")
    if any(isinstance(function, str | PreTrainedModel) for function in functions):
        found.append("a reward model")
    if found:
        raise ValueError(
            f"With fsdp_cpu_ram_efficient_loading: true, {' and '.join(found)} would have no weights on any process "
            "but the first. Set it to false, under fsdp_config in the file of accelerate."
        )
