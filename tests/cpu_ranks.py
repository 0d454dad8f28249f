"""Real FSDP2 and DeepSpeed on CPU ranks, which talk over gloo.

accelerate enters FSDP only where it sees several GPUs, and DeepSpeed only where no CPU was asked for. Else it trains
DDP, without a word. `admit_engines` opens both doors, and `held` tells what came in: every test of an engine asks it.

A launch spends half a minute on imports. `Ranks` imports once, and forks the ranks of every run that it is asked for.
Where the launch itself is what is tested, this file stands before the script:

    accelerate launch --config_file FILE tests/cpu_ranks.py SCRIPT ARGUMENTS
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).parents[1]
PATIENCE = 600  # seconds; a loaded machine is slow, but it gets there
ON_CPU = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
DDP = ("--config_file", "recipes/accelerate/two_cpu_processes.yaml")
FSDP2 = ("--config_file", "recipes/accelerate/one_node_fsdp2.yaml", "--mixed_precision", "no")
FSDP2_SHARDED = (*FSDP2, "--fsdp_state_dict_type", "SHARDED_STATE_DICT")
ZERO3 = ("--config_file", "recipes/accelerate/one_node_zero3.yaml", "--mixed_precision", "no")
ZERO2 = (*ZERO3, "--zero_stage", "2", "--zero3_init_flag", "false")


def admit_engines():
    """Let accelerate believe that these CPUs are what its engines are for. In a process, and in those forked of it."""
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    enter_process, enter_engine = PartialState.__init__, AcceleratorState.__init__

    def process(self, *args, **kwargs):
        enter_process(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            if os.environ.get("ACCELERATE_USE_FSDP") == "true":
                self.distributed_type = DistributedType.MULTI_GPU
            if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
                self.distributed_type = DistributedType.DEEPSPEED

    def engine(self, mixed_precision=None, cpu=False, *args, **kwargs):
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
            return enter_engine(self, mixed_precision, cpu, *args, **kwargs)
        PartialState(cpu=True)  # which asked for the CPU. Now nobody does
        asked = os.environ.pop("ACCELERATE_USE_CPU", None)
        try:
            return enter_engine(self, mixed_precision, False, *args, **kwargs)
        finally:
            if asked is not None:
                os.environ["ACCELERATE_USE_CPU"] = asked

    PartialState.__init__, AcceleratorState.__init__ = process, engine
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor: tensor  # which `fsdp_offload_params` does for copies to a GPU


# What a rank has


def held(trainer) -> dict:
    """The engine, and which shares of the weights and of the optimizer's states this rank holds. After training."""
    from torch.distributed.tensor import DTensor

    weights = list(unwrapped(trainer).parameters())
    stepped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    total, trained = (sum(whole_size(p) for p in each) for each in (weights, [p for p in weights if p.requires_grad]))
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO-1 and -2
        stepped = optimizer.single_partition_of_fp32_groups
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        stepped = optimizer.fp32_partitioned_groups_flat
    return {
        "engine": trainer.accelerator.distributed_type.value,
        "weights": sum(local_size(p) for p in weights) / total,
        "optimizer": sum(local_size(p) for p in stepped) / trained,
        "DTensor": all(isinstance(p, DTensor) for p in weights),
    }


def whole_size(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def local_size(parameter) -> int:
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor.ds_numel
    return getattr(parameter, "_local_tensor", parameter).numel()


def unwrapped(trainer):
    return trainer.accelerator.unwrap_model(trainer.model_wrapped)


def whole_weights(trainer) -> dict:
    """All weights, gathered, by name. To be called on every rank."""
    weights = {}
    for name, parameter in unwrapped(trainer).named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters([parameter])
        else:
            gathered = contextlib.nullcontext()
        with gathered:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            weights[name] = whole.detach().clone()
    return weights


# Forked ranks


class Ranks:
    """A process that has imported what trainings import, and forks the ranks of each run.

    Args:
        folder: For what ranks print and return.
    """

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, 0
        with (folder / "server_log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "import cpu_ranks; cpu_ranks.serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | ON_CPU | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *search_path()]))},
                start_new_session=True,  # all of them end with `close`
            )

    def run(self, function: str, *arguments, processes: int = 2, launch: tuple = (), fails: bool = False):
        """Call a function on every rank.

        Args:
            function: "module:name" below tests/. What it returns must be what `torch.load` reads without pickles.
            arguments: As JSON would hold them; paths become strings.
            launch: Flags of `accelerate launch`, from which the environment of the ranks is made. None: one process.
            fails: Whether the ranks are meant to end with something else than 0.

        Returns:
            What each rank returned, in their order, unless they fail.
        """
        import torch

        self.runs += 1
        folder = self.folder / f"run_{self.runs}"
        folder.mkdir()
        request = {
            "function": function,
            "arguments": [str(each) if isinstance(each, Path) else each for each in arguments],
            "processes": processes,
            "launch": [*launch, "--num_processes", str(processes), "--num_machines", "1"] if launch else [],
            "folder": str(folder),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.close()
        statuses = json.loads(self.process.stdout.readline() or "null")
        assert statuses is not None, f"no answer: {self.printed()}"
        assert any(statuses) is fails, f"statuses {statuses}: {self.printed()}"
        if not fails:
            return [torch.load(folder / f"returned_{rank}", weights_only=True) for rank in range(processes)]

    def printed(self) -> str:
        """By the ranks of the last run, one after the other."""
        logs = sorted((self.folder / f"run_{self.runs}").glob("log_*"))
        return "".join(path.read_text() for path in [*logs, self.folder / "server_log"])

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def search_path() -> list[Path]:
    """Where the functions of tests are: in their folders, as for pytest."""
    return [ROOT / "tests", *(path for path in sorted((ROOT / "tests").iterdir()) if path.is_dir())]


def serve():
    """Answer requests of `Ranks` with the exit statuses of the ranks, a line each."""
    admit_engines()
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed.ops
        import torch

        import fipo_trl.trainer.fipo_trainer  # noqa: F401

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, and gloo does the same
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            environment = environment_of(request["launch"]) if request["launch"] else {}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        print(json.dumps(fork(request, environment)), flush=True)


def environment_of(launch: list[str]) -> dict[str, str]:
    """What `accelerate launch` with these flags adds to the environment of its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*launch, "script"]))
    arguments.main_process_port = 0
    if arguments.use_deepspeed:
        fields = ",".join([*defaults.deepspeed_config, "mixed_precision"])
        arguments.deepspeed_fields_from_accelerate_config = fields
        _, environment = prepare_deepspeed_cmd_env(arguments)
    elif arguments.use_fsdp or arguments.multi_gpu:
        environment = prepare_multi_gpu_env(arguments)
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    if arguments.use_deepspeed or arguments.use_fsdp or arguments.multi_gpu:
        environment["WORLD_SIZE"] = str(arguments.num_processes)
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def fork(request: dict, environment: dict[str, str]) -> list[int]:
    """Run a request on as many ranks as it asks for. If one fails, those that wait for it are killed."""
    ranks: dict[int, int] = {}
    for rank in range(request["processes"]):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, request, environment)
        ranks[pid] = rank
    statuses = [0] * len(ranks)
    left = dict(ranks)
    while left:
        pid, status = os.wait()
        statuses[left.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status != 0:
            time.sleep(1)  # the others say what they found, too
            for other in left:
                os.kill(other, signal.SIGKILL)
    return statuses


def be_rank(rank: int, request: dict, environment: dict[str, str]):
    """Call the function in this process, and end it."""
    import torch

    folder, status = Path(request["folder"]), 1
    with (folder / f"log_{rank}").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        os.environ.update(environment)
        if "WORLD_SIZE" in environment:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": environment["WORLD_SIZE"]}
        module, name = request["function"].split(":")
        returned = getattr(importlib.import_module(module), name)(*request["arguments"])
        torch.save(returned, folder / f"returned_{rank}")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # who exits while another still talks to him would abort that one
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without the clean-up of the process of which this is a copy


if __name__ == "__main__":
    os.environ.update(ON_CPU)
    sys.path.insert(0, str(ROOT))
    admit_engines()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
