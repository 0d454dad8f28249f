"""A LoRA adapter as vLLM can be given it: which ones it can serve, and their matrices."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


@dataclass(frozen=True)
class Room:
    """What vLLM can serve of adapters: up to which rank, in which precision, of which linear layers."""

    rank: int
    dtype: torch.dtype
    modules: set[str]


def engine_rank(rank: int) -> int:
    """For which rank vLLM makes room, where adapters have this one at most."""
    return next(each for each in ENGINE_RANKS if each >= rank)


def unserved_adapter(model: Any) -> str | None:
    """What of an adapter, or trained beside it, is more than two matrices for each of some linear layers."""
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active"
    adapter = model.active_adapter
    known: set[int] = set()
    for name, layer in lora_layers(model):
        if type(layer) is not LoraLinear or type(layer.get_base_layer()) is not nn.Linear:
            return (
                f"{base_name(name)} ({type(layer.get_base_layer()).__name__}) has an adapter, and is no linear layer"
            )
        if adapter in layer.lora_variant:
            return f"the adapter is of a kind that vLLM does not know ({type(layer.lora_variant[adapter]).__name__})"
        if layer.r[adapter] > ENGINE_RANKS[-1]:
            return f"its rank {layer.r[adapter]} is above {ENGINE_RANKS[-1]}, vLLM's largest"
        known |= {id(layer.lora_A[adapter].weight), id(layer.lora_B[adapter].weight)}
    if not known:
        return "it has no layers of LoRA"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            return f"{name} is trained, too"
    return None


def base_weights(model: Any, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The weights without adapters, whole, one at a time, under the names of the base model."""
    for name, parameter in model.named_parameters():
        if model.prefix not in name:
            with whole([parameter], device) as (weight,):
                yield base_name(name), weight


def adapter_weights(model: Any, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The matrices of the active adapter, whole, as copies on the CPU: A (r, in), and B (out, r) times its scaling.

    The scaling is the one of each layer, whatever made it (alpha, rsLoRA, patterns). So vLLM has nothing to scale,
    which it would do in place.
    """
    for name, layer in lora_layers(model):
        a, b = layer.lora_A[model.active_adapter].weight, layer.lora_B[model.active_adapter].weight
        with whole([a, b], device) as (a, b):
            for part, matrix in (("A", a), ("B", b * layer.scaling[model.active_adapter])):
                yield f"{base_name(name)}.lora_{part}.weight", matrix.to("cpu", dtype, copy=True)


def lora_layers(model: Any) -> Iterator[tuple[str, LoraLayer]]:
    """The layers of the active adapter, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and model.active_adapter in module.r:
            yield name, module


def base_name(name: str) -> str:
    """What a parameter or module of a PEFT model is called in the base model, and in vLLM."""
    return name.removeprefix("base_model.model.").replace("_checkpoint_wrapped_module.", "").replace(".base_layer", "")


@contextmanager
def whole(parameters: list[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
    """Parameters of which FSDP2 or ZeRO-3 may have left this process a share only. All processes must ask for them."""
    gathered: AbstractContextManager = nullcontext()
    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # ZeRO-3
        import deepspeed  # type: ignore[import-untyped]

        gathered = deepspeed.zero.GatheredParameters(parameters)
    with gathered:
        yield [gathered_shares(p.detach(), device) if isinstance(p, DTensor) else p.data for p in parameters]


def gathered_shares(parameter: Any, device: torch.device) -> Tensor:
    """A parameter that FSDP2 has sharded. Shares that it has offloaded are gathered on the device."""
    return parameter.to(device).full_tensor()
