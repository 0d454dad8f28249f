"""Brings trained weights into a vLLM server that runs on the CPU. vLLM imports this when it is started with

    --weight-transfer-config '{"backend": "gloo"}'

under which name `vllm_cpu.register` has made it known. The trainer's side is `trainer/vllm_server.py`.
"""

import torch
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from fipo_trl.engines.gloo_group import GlooGroup


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's engine for weights sent by NCCL, with its messages and its reload of layers, over gloo."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo):
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank + init_info.rank_offset
        self.group = GlooGroup(init_info.master_address, init_info.master_port, rank, init_info.world_size)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo):
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(weight)
            self.model.load_weights([(name, weight)])
