"""Weights known beforehand, so that an engine without them is seen to differ, whatever became of the policy."""

import contextlib

import torch
from cpu_ranks import unwrapped, whole_weights
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback


NOISE = 0.5  # of each weight matrix's standard deviation


class MoveTheWeights(TrainerCallback):
    """After each generation: set the trained weights to others. After `synced` generations: cut the weight sync.

    Under FSDP2 and ZeRO-3, too, where every rank moves its share.
    """

    def __init__(self, trainer, synced: int):
        self.trainer, self.synced = trainer, synced

    def on_train_begin(self, args, state, control, **kwargs):
        trained = {name for name, weight in unwrapped(self.trainer).named_parameters() if weight.requires_grad}
        self.first = {name: weight for name, weight in whole_weights(self.trainer).items() if name in trained}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        generation, step = divmod(state.global_step, args.updates_per_generation)
        if step != 0:
            return
        if generation == self.synced:
            self.trainer.vllm_generation.sync_weights = lambda: None
        generator = torch.Generator().manual_seed(int(generation))
        weights = dict(unwrapped(self.trainer).named_parameters())
        for name, first in self.first.items():
            if first.dim() == 2:  # norms and biases stay
                # LoRA's second matrices begin as zeros
                noise = NOISE * (first.std().item() or 0.1) * torch.randn(first.shape, generator=generator)
                set_weight(weights[name], first + noise)


def set_weight(weight: torch.nn.Parameter, value: torch.Tensor):
    """Set a weight of which this rank may have a share only."""
    if hasattr(weight, "ds_id"):  # ZeRO-3
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
    else:
        gathered = contextlib.nullcontext()
    if isinstance(weight, DTensor):  # FSDP2
        value = distribute_tensor(value, weight.device_mesh, weight.placements)
    with gathered:
        weight.data.copy_(value)
