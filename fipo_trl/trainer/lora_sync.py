"""With LoRA, vLLM serves the base and is given the adapter, in memory, for every generation.

TRL merges the adapter into the weights, sends all of them, and takes it out again. That moves the whole model, rounds
where weights are bfloat16, and leaves the rounding in the base. Here the base is sent once, as the trainer has it, and
after that the adapter alone, under a number of its own. vLLM's cache of prefixes knows adapters by name, and the
engine holds one at a time: it cannot answer for an older one. A server gets it over the group that TRL made for
weights, see `vllm_server.py`.

What vLLM cannot serve as an adapter goes TRL's way, and all does with `vllm_merge_lora`. The log says which way is
taken, and why.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, is_peft_model
from torch import Tensor
from transformers import ProcessorMixin
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration, empty_cache
from trl.trainer import grpo_trainer

from fipo_trl.engines.adapter_worker import lora_model, served_modules
from fipo_trl.trainer.lora_adapter import (
    Room,
    adapter_weights,
    base_name,
    base_weights,
    engine_rank,
    lora_layers,
    unserved_adapter,
)
from fipo_trl.trainer.trl_contract import check_generation
from fipo_trl.trainer.vllm_server import described


logger = get_logger(__name__)


@contextmanager
def adapter_sync(merge: bool) -> Iterator[None]:
    """While a trainer is built: what TRL makes to sample with vLLM is an [`AdapterGeneration`].

    Args:
        merge: Whether adapters shall be merged, wherever vLLM could serve them.
    """
    grpo_trainer.VLLMGeneration = partial(AdapterGeneration, merge)
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = VLLMGeneration


class AdapterGeneration(VLLMGeneration):
    """TRL's, but for the sync of a LoRA adapter. Without LoRA it is TRL's.

    All processes must call `sync_weights`, as they must TRL's.
    """

    llm: Any
    vllm_client: Any  # of a server, in the main process

    def __init__(self, merge: bool, *args, **kwargs):
        self.merge = merge
        super().__init__(*args, **kwargs)

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
            rank = max(layer.r[self.model.active_adapter] for _, layer in lora_layers(self.model))
            room = self._engine_for(rank) if self.mode == "colocate" else self._room_of_server()
            unknown = sorted({base_name(name) for name, _ in lora_layers(self.model)} - room.modules)
            if room.rank < rank:
                of_rank = f"for adapters of rank {room.rank} at most, and this one has {rank}"
                started = of_rank if room.rank else "without room for adapters"
                reason = (
                    f"the vLLM server was started {started}. Start it with the line that "
                    "`fipo-trl vllm-server-command` prints for this recipe"
                )
            elif unknown:
                reason = f"vLLM does not know {unknown[0]}, one of {len(unknown)} such modules, as one with an adapter"
                if self.mode == "colocate":
                    self.llm = self.llm.llm  # which takes merged weights, too
            self._adapter_dtype = room.dtype
        self.serves_adapter = reason is None
        if reason is None:
            sleeps = self.mode == "colocate" and self.enable_sleep_mode
            asleep = " While it sleeps, its weights lie in the CPU's memory." if sleeps else ""
            logger.info(f"vLLM serves the base, and gets the LoRA adapter alone for each generation.{asleep}")
        else:
            logger.warning(
                f"For each generation the LoRA adapter is merged and vLLM gets all weights, as TRL does it: {reason}."
            )

    def _engine_for(self, rank: int) -> Room:
        """Start an engine for adapters of this rank."""
        engine = vllm_generation.LLM
        vllm_generation.LLM = partial(AdapterEngine, engine, rank)
        try:
            super()._init_vllm()
        finally:
            vllm_generation.LLM = engine
        return self.llm.room

    def _room_of_server(self) -> Room:
        """Connect the main process, which asks the server for all of them."""
        super()._init_vllm()
        answer: list[Any] = [self.vllm_client.room() if self.accelerator.is_main_process else None]
        broadcast_object_list(answer)
        return answer[0]

    def sync_weights(self):
        if not self.serves_adapter:
            super().sync_weights()
            return
        device, colocated = self.accelerator.device, self.mode == "colocate"
        if colocated and self.enable_sleep_mode:
            empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        if not self._has_base:
            if colocated:
                for name, weight in base_weights(self.model, device):
                    self.llm.load_base(name, weight)
            else:
                self._send_base(device)
            self._has_base = True
        adapter = dict(adapter_weights(self.model, device, self._adapter_dtype))
        if colocated or self.accelerator.is_main_process:
            engine = self.llm if colocated else self.vllm_client
            engine.serve(adapter)
            engine.reset_prefix_cache()

    def _send_base(self, device: torch.device):
        """As TRL sends all weights: they are gathered once to announce them, and once to send them."""
        announced = described(base_weights(self.model, device))
        weights = base_weights(self.model, device)
        if self.accelerator.is_main_process:
            self.vllm_client.update_named_params(announced, weights)
        for _ in weights:  # all processes gather them
            pass


# What vLLM can serve


def why_merged(generation: AdapterGeneration) -> str | None:
    """Why a LoRA adapter cannot be given to vLLM as it is, for people; None if nothing is known against it."""
    model: Any = generation.model
    if generation.merge:
        return "vllm_merge_lora is true"
    plugin = getattr(generation.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        return "FSDP1 gathers whole modules only"
    return unserved_adapter(model) or unserved_model(generation)


def unserved_model(generation: VLLMGeneration) -> str | None:
    """What in vLLM stands against adapters for this model."""
    from vllm import ModelRegistry
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.model_executor.models import supports_lora

    if isinstance(generation.processing_class, ProcessorMixin):
        return "the model reads images, for which this was not tested"
    if not hasattr(BaseLayerWithLoRA, "load_weights"):
        return "this vLLM does not load weights into layers with adapters; 0.31 does"
    name = (generation.model.config.architectures or ["this model"])[0]
    if generation.model_impl not in ("auto", "vllm") or name not in ModelRegistry.models:
        return f"vLLM runs {name} through transformers"
    if not supports_lora(ModelRegistry.models[name].load_model_cls()):
        return f"vLLM has no adapters for {name}"
    return None


class AdapterEngine:
    """A vLLM engine that answers all that is asked of it with the adapter it was given last. It is `llm` in all else.

    Args:
        make: vLLM's `LLM`.
        rank: Of the adapters to come, at most.
        settings: Of the `LLM`.
    """

    def __init__(self, make: Any, rank: int, **settings):
        self.llm = make(**settings, enable_lora=True, max_lora_rank=engine_rank(rank), max_loras=1)
        self._request: Any = None  # of the adapter that is served
        self._served = 0  # adapters so far

    def __getattr__(self, name: str):
        return getattr(self.llm, name)

    @property
    def _runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.model_runner

    @property
    def room(self) -> Room:
        lora = self.llm.llm_engine.vllm_config.lora_config
        return Room(lora.max_lora_rank, lora.lora_dtype, served_modules(self._runner))

    def load_base(self, name: str, weight: Tensor):
        """
        Raises:
            RuntimeError: if vLLM's model has no such weight.
        """
        if self._runner.model.load_weights([(name, weight)]) == set():
            raise RuntimeError(f"vLLM has no weight {name} of the base model.")

    def serve(self, adapter: dict[str, Tensor]):
        """Answer with this adapter from now on, and forget the one before.

        Args:
            adapter: As `adapter_weights` gives it. Its matrices are not copied.
        """
        from vllm.lora.request import LoRARequest

        self._request = None
        self._served += 1
        manager = self._runner.lora_manager._adapter_manager
        manager.remove_all_adapters()
        manager.add_adapter(lora_model(self._served, adapter, self._runner.lora_manager.lora_config.lora_dtype))
        manager.activate_adapter(self._served)
        # Were it ever evicted, vLLM would look for a file of this name, and fail
        self._request = LoRARequest(f"adapter-{self._served}", self._served, "in the memory of the trainer")

    def generate(self, *args, **kwargs):
        if self._request is None:
            raise RuntimeError("The vLLM engine has no adapter: sync_weights comes before generate.")
        return self.llm.generate(*args, **{"lora_request": self._request} | kwargs)

    def sleep(self, level: int = 1):
        """Keep the weights in the CPU's memory, whatever `level` says: of the base they are not sent again."""
        self.llm.sleep(level=1)
