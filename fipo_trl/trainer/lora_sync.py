"""With LoRA, a colocated vLLM engine serves the base and is given the adapter, in memory, for every generation.

TRL merges the adapter into the weights, sends all of them, and takes it out again. That moves the whole model, rounds
where weights are bfloat16, and leaves the rounding in the base. Here the base is sent once, as the trainer has it, and
after that the adapter alone, under a number of its own. vLLM's cache of prefixes knows adapters by name, and the
engine holds one at a time: it cannot answer for an older one.

What vLLM cannot serve as an adapter goes TRL's way. The log says which way is taken, and why.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import ProcessorMixin
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration, empty_cache
from trl.trainer import grpo_trainer

from fipo_trl.trainer.trl_contract import check_generation


logger = get_logger(__name__)

ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


@contextmanager
def adapter_sync() -> Iterator[None]:
    """While a trainer is built: what TRL makes to sample with vLLM is an [`AdapterGeneration`]."""
    grpo_trainer.VLLMGeneration = AdapterGeneration
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = VLLMGeneration


class AdapterGeneration(VLLMGeneration):
    """TRL's, but for the sync of a LoRA adapter with a colocated engine. Without LoRA it is TRL's.

    All processes must call `sync_weights`, as they must TRL's.
    """

    llm: Any

    def _init_vllm(self):
        self.serves_adapter, self._has_base = False, False
        if not is_peft_model(self.model):
            super()._init_vllm()
            return
        check_generation(VLLMGeneration)
        reason = why_merged(self)
        if reason is not None:
            super()._init_vllm()
        else:
            engine = vllm_generation.LLM
            rank = max(layer.r[self.model.active_adapter] for _, layer in lora_layers(self.model))
            vllm_generation.LLM = partial(AdapterEngine, engine, rank)
            try:
                super()._init_vllm()
            finally:
                vllm_generation.LLM = engine
            names = {base_name(name) for name, _ in lora_layers(self.model)}
            unknown = sorted(names - self.llm.served_modules())
            if unknown:
                reason = f"vLLM does not know {unknown[0]}, one of {len(unknown)} such modules, as one with an adapter"
                self.llm = self.llm.llm  # which takes merged weights, too
        self.serves_adapter = reason is None
        if reason is None:
            asleep = " While it sleeps, its weights lie in the CPU's memory." if self.enable_sleep_mode else ""
            logger.info(f"vLLM serves the base, and gets the LoRA adapter alone for each generation.{asleep}")
        else:
            logger.warning(
                f"For each generation the LoRA adapter is merged and vLLM gets all weights, as TRL does it: {reason}."
            )

    def sync_weights(self):
        if not self.serves_adapter:
            super().sync_weights()
            return
        if self.enable_sleep_mode:
            empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        device = self.accelerator.device
        if not self._has_base:
            for name, weight in base_weights(self.model, device):
                self.llm.load_base(name, weight)
            self._has_base = True
        self.llm.serve(dict(adapter_weights(self.model, device, self.llm.adapter_dtype)))
        self.llm.reset_prefix_cache()


# The weights of a PEFT model


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
        from deepspeed.zero import GatheredParameters  # type: ignore[import-untyped]

        gathered = GatheredParameters(parameters)
    with gathered:
        yield [gathered_shares(p.detach(), device) if isinstance(p, DTensor) else p.data for p in parameters]


def gathered_shares(parameter: Any, device: torch.device) -> Tensor:
    """A parameter that FSDP2 has sharded. Shares that it has offloaded are gathered on the device."""
    return parameter.to(device).full_tensor()


# What vLLM can serve


def why_merged(generation: VLLMGeneration) -> str | None:
    """Why a LoRA adapter cannot be given to vLLM as it is, for people; None if nothing is known against it."""
    model: Any = generation.model
    if generation.mode != "colocate":
        return "vllm_mode is 'server', and TRL's client sends weights only"
    plugin = getattr(generation.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        return "FSDP1 gathers whole modules only"
    return unserved_adapter(model) or unserved_model(generation)


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


def unserved_model(generation: VLLMGeneration) -> str | None:
    """What in vLLM stands against adapters for this model."""
    from vllm import ModelRegistry
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.model_executor.models import supports_lora

    if isinstance(generation.processing_class, ProcessorMixin):
        return "the model reads images, for which this was not tested"
    if not hasattr(BaseLayerWithLoRA, "load_weights"):
        return "this vLLM does not load weights into layers with adapters; 0.31 does"
    names = getattr(generation.model.config, "architectures", None) or [
        type(generation.model.base_model.model).__name__
    ]
    if generation.model_impl not in ("auto", "vllm") or names[0] not in ModelRegistry.models:
        return f"vLLM runs {names[0]} through transformers"
    if not supports_lora(ModelRegistry.models[names[0]].load_model_cls()):
        return f"vLLM has no adapters for {names[0]}"
    return None


class AdapterEngine:
    """A vLLM engine that answers all that is asked of it with the adapter it was given last. It is `llm` in all else.

    Args:
        make: vLLM's `LLM`.
        rank: Of the adapters to come, at most.
        settings: Of the `LLM`.
    """

    def __init__(self, make: Any, rank: int, **settings):
        room = next(each for each in ENGINE_RANKS if each >= rank)
        self.llm = make(**settings, enable_lora=True, max_lora_rank=room, max_loras=1)
        self.rank = rank
        self._request: Any = None  # of the adapter that is served
        self._served = 0  # adapters so far

    def __getattr__(self, name: str):
        return getattr(self.llm, name)

    @property
    def _runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.model_runner

    @property
    def adapter_dtype(self) -> torch.dtype:
        return self.llm.llm_engine.vllm_config.lora_config.lora_dtype

    def served_modules(self) -> set[str]:
        """Names of the linear layers that can have an adapter, as the trainer's model has them."""
        from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

        manager = self._runner.lora_manager._adapter_manager
        linear = [name for name, module in manager.modules.items() if isinstance(module, BaseLinearLayerWithLoRA)]
        return {part for name in linear for part in manager.packed_modules.get(name, [name])}

    def load_base(self, name: str, weight: Tensor):
        """
        Raises:
            RuntimeError: if vLLM's model has no such weight.
        """
        if not self._runner.model.load_weights([(name, weight)]):
            raise RuntimeError(f"vLLM has no weight {name} of the base model.")

    def serve(self, adapter: dict[str, Tensor]):
        """Answer with this adapter from now on, and forget the one before.

        Args:
            adapter: (r, in) and (out, r) matrices on the CPU, by the name of their layer and `.lora_A.weight` or
                `.lora_B.weight`. They are not copied.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.request import LoRARequest

        self._request = None
        self._served += 1
        manager = self._runner.lora_manager._adapter_manager
        manager.remove_all_adapters()
        unscaled = PEFTHelper(r=self.rank, lora_alpha=self.rank, target_modules=[])
        model = LoRAModel.from_lora_tensors(self._served, adapter, unscaled, device="cpu", dtype=self.adapter_dtype)
        manager.add_adapter(model)
        manager.activate_adapter(model.id)
        # Were it ever evicted, vLLM would look for a file of this name, and fail
        self._request = LoRARequest(f"adapter-{self._served}", self._served, "in the memory of the trainer")

    def generate(self, *args, **kwargs):
        if self._request is None:
            raise RuntimeError("The vLLM engine has no adapter: sync_weights comes before generate.")
        return self.llm.generate(*args, **{"lora_request": self._request} | kwargs)

    def sleep(self, level: int = 1):
        """Keep the weights in the CPU's memory, whatever `level` says: of the base they are not sent again."""
        self.llm.sleep(level=1)
