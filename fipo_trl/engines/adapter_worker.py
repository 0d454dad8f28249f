"""LoRA adapters that vLLM gets in memory. It knows those in files only.

A colocated engine is given them by `trainer/lora_sync.py`. Into the workers of a server vLLM mixes [`AdapterWorker`],
when it is started with

    --worker-extension-cls fipo_trl.engines.adapter_worker.AdapterWorker

vLLM is imported where it is needed: the line above is made where there is none.
"""

import json
from typing import Any

import torch
from torch import Tensor


class AdapterWorker:
    """What a worker can do besides. The trainer's `ServerClient` calls it, by vLLM's `/collective_rpc`."""

    weight_transfer_engine: Any
    model_runner: Any

    def served_modules(self) -> list[str]:
        return sorted(served_modules(self.model_runner))

    def receive_adapter(self, name: str, update_info: str):
        """Get the matrices that the trainer sends now, for the adapter that vLLM is going to load by this name.

        vLLM's own engine for weights receives them, over whatever it has. It updates nothing: that would take the
        layers to pieces, and forget all adapters.

        Args:
            name: Of the adapter. Another one has its own.
            update_info: As of vLLM's `/update_weights`, in JSON.
        """
        engine, manager, sent = self.weight_transfer_engine, self.model_runner.lora_manager, Sent()
        engine.model = sent
        try:
            engine.update_weights(json.loads(update_info))
        finally:
            engine.reset_weight_update_target()

        def load_adapter(request: Any) -> Any:
            if request.lora_name != name:
                return type(manager)._load_adapter(manager, request)  # from its folder
            return lora_model(request.lora_int_id, sent.adapter, manager.lora_config.lora_dtype)

        manager._load_adapter = load_adapter


class Sent:
    """In place of the model, for as long as an adapter is received: it keeps what it should load."""

    def __init__(self):
        self.adapter: dict[str, Tensor] = {}

    def load_weights(self, weights: Any):
        self.adapter |= {name: weight.to("cpu", copy=True) for name, weight in weights}


def served_modules(model_runner: Any) -> set[str]:
    """Names of the linear layers that can have an adapter, as the trainer's model has them."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    manager = model_runner.lora_manager._adapter_manager
    linear = [name for name, module in manager.modules.items() if isinstance(module, BaseLinearLayerWithLoRA)]
    return {part for name in linear for part in manager.packed_modules.get(name, [name])}


def lora_model(number: int, adapter: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """An adapter as vLLM has it when it was read.

    Args:
        number: By which vLLM knows it.
        adapter: (r, in) and (out, r) matrices on the CPU, by the name of their layer and `.lora_A.weight` or
            `.lora_B.weight`, which is scaled. They are not copied where they have the `dtype`.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    rank = max(matrix.shape[0] for name, matrix in adapter.items() if name.endswith(".lora_A.weight"))
    unscaled = PEFTHelper(r=rank, lora_alpha=rank, target_modules=[])
    return LoRAModel.from_lora_tensors(number, adapter, unscaled, device="cpu", dtype=dtype)
