"""A connection of the trainer with the workers of a vLLM server, over gloo: for machines that have no NCCL."""

from datetime import timedelta

import torch
from torch import Tensor


PATIENCE = timedelta(minutes=5)  # for the others to join, and for each tensor


class GlooGroup:
    """The trainer's main process, which is rank 0, and the workers of its server. All must join at the same time.

    It has nothing to do with the group in which several processes train. So it is made of its parts: torch's own
    rendezvous would find the variables that torchrun set for those.

    Args:
        address: Of the machine of rank 0.
        port: One that is free there.
        rank: Of this process.
        world_size: The workers, and one.

    Raises:
        RuntimeError: where not all join in time. `broadcast` too, where another one is gone.
    """

    def __init__(self, address: str, port: int, rank: int, world_size: int):
        store = torch.distributed.TCPStore(address, port, world_size, is_master=rank == 0, timeout=PATIENCE)
        self._group = torch.distributed.ProcessGroupGloo(store, rank, world_size, PATIENCE)

    def broadcast(self, tensor: Tensor):
        """Send a tensor from rank 0, into those of the same shape and dtype that the others give."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._group.broadcast([tensor], options).wait()  # type: ignore[attr-defined]  # not in torch's stubs
