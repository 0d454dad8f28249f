"""Train with vLLM in any mode, cut the weight sync on the way, and return what was seen. On ranks of `cpu_ranks`.

The engine computes in float32, like the trainer, so that nothing but wrong weights can make the two differ. A server
was started so; a colocated one is started so here.
"""

import contextlib
import functools
import glob
import os
import signal
import time
from pathlib import Path

import psutil
import torch
from cpu_ranks import held
from held import lives
from moved_weights import MoveTheWeights
from peft import LoraConfig
from tiny import PROMPTS, Dataset, logged, longer_is_better, make_args
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.generation import vllm_generation

from fipo_trl import FIPOTrainer


SYNCED = 3  # generations, before the one without a sync


def make_trainer(folder: str, model, lora: bool, settings: dict, merged: bool = False, rank: int = 4) -> FIPOTrainer:
    """`merged`: a LoRA adapter of this rank goes TRL's way."""
    return FIPOTrainer(
        model=model,
        reward_funcs=longer_is_better,
        args=make_args(
            folder,
            use_vllm=True,
            steps_per_generation=2,
            max_steps=2 * (SYNCED + 1),
            learning_rate=1e-3,
            vllm_merge_lora=merged,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=rank, target_modules="all-linear") if lora else None,
    )


def train(folder: str, model: str, lora: bool, settings: dict, merged: bool = False, rank: int = 4) -> dict:
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
    trainer = make_trainer(folder, model, lora, settings, merged, rank)
    trainer.add_callback(MoveTheWeights(trainer, SYNCED))
    generation = trainer.vllm_generation
    syncs = counted(generation) if generation.mode == "colocate" else []
    trainer.train()
    if generation.mode == "colocate" and generation.tensor_parallel_size > 1:
        # Memory that ranks share; a forked one ends without vLLM's clean-up
        from vllm.distributed.parallel_state import get_tp_group

        name = get_tp_group().device_communicator.agreed_name
        for left in Path("/dev/shm").glob(f"{glob.escape(name)}_*"):
            left.unlink(missing_ok=True)
    return {
        "held": held(trainer),
        "tensor_parallel": generation.tensor_parallel_size,
        "serves_adapter": generation.serves_adapter,
        "mean": logged(trainer, "engine_mismatch/mean"),
        "nan_tokens": logged(trainer, "engine_mismatch/nan_tokens"),
        "syncs": syncs,
    }


@torch.no_grad()
def answers(folder: str, model: str, settings: dict) -> dict:
    """What the trainer and its server answer with several adapters, on another base than the server's own.

    The server's cache of prefixes is not emptied. It has a block for each 32 tokens of the prompt.
    """
    from adapters_in_vllm import LONG, draw_adapter, greedy

    base = AutoModelForCausalLM.from_pretrained(model)
    for weight in base.parameters():
        weight.mul_(1.1)
    trainer = make_trainer(folder, base, True, settings)
    client = trainer.vllm_generation.vllm_client
    client.reset_prefix_cache = lambda: None
    prompt, seen = trainer.processing_class.encode(LONG), {"trainer": [], "server": [], "known": []}
    for number in range(4):
        draw_adapter(trainer.model, number)
        trainer.vllm_generation.sync_weights()
        asked = {"temperature": 0.0, "max_tokens": 12, "generation_kwargs": {"min_tokens": 12}}
        first, again = (client.generate([prompt], **asked)["completion_ids"][0] for _ in range(2))
        assert first == again
        seen["server"].append(first)
        seen["trainer"].append(greedy(trainer))
        seen["known"].append([each["id"] for each in client._get(f"{client.base_url}/v1/models")["data"]])
    return seen


def bereaved(folder: str, model: str, settings: dict, server: int) -> str:
    """What a rank says when the server, a process of this number, is killed between two generations."""
    trainer = make_trainer(folder, model, True, settings)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if trainer.accelerator.is_main_process and state.global_step == args.updates_per_generation:
                kill(server)

    trainer.add_callback(Kill())
    try:
        trainer.train()
    except ConnectionError as error:
        return str(error)
    return ""


def kill(server: int):
    """With -9. Its other processes are left to clean up, and must not outlive the test."""
    with contextlib.suppress(psutil.NoSuchProcess):
        others = psutil.Process(server).children(recursive=True)
        os.kill(server, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 30
            for process in filter(lives, others):
                process.send_signal(number)
            while any(map(lives, others)) and time.monotonic() < deadline:
                time.sleep(0.05)


def counted(generation) -> list[tuple[int, float]]:
    """Bytes that come into the engine of this rank, and seconds, of each sync from now on."""
    syncs, moved = [], [0]
    sync_weights = generation.sync_weights

    def count(owner, name):
        method = getattr(owner, name)

        def counting(weights):
            moved[0] += sum(weight.nbytes for _, weight in (weights.items() if name == "serve" else weights))
            return method(weights)

        setattr(owner, name, counting)

    def sync():
        moved[0], start = 0, time.perf_counter()
        sync_weights()
        syncs.append((moved[0], time.perf_counter() - start))

    count(generation.llm.llm_engine.model_executor.driver_worker.model_runner.model, "load_weights")
    if generation.serves_adapter:
        count(generation.llm, "serve")
    generation.sync_weights = sync
    return syncs


def check(seen: dict):
    """What the first rank returned: the engine had the trainer's weights as long as they were sent to it."""
    *synced, cut = seen["mean"]
    assert len(synced) == SYNCED
    assert max(synced) < 1e-4, seen
    assert cut > 1e-2, seen  # a sync that is cut does not pass for one
    assert sum(seen["nan_tokens"]) == 0
