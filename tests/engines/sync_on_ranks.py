"""Train with vLLM in any mode, cut the weight sync on the way, and return what was seen. On ranks of `cpu_ranks`.

The engine computes in float32, like the trainer, so that nothing but wrong weights can make the two differ. A server
was started so; a colocated one is started so here.
"""

import functools
import glob
from pathlib import Path

from cpu_ranks import held
from moved_weights import MoveTheWeights
from peft import LoraConfig
from tiny import PROMPTS, Dataset, logged, longer_is_better, make_args
from trl.generation import vllm_generation

from fipo_trl import FIPOTrainer


SYNCED = 3  # generations, before the one without a sync


def train(folder: str, model: str, lora: bool, settings: dict) -> dict:
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
    trainer = FIPOTrainer(
        model=model,
        reward_funcs=longer_is_better,
        args=make_args(
            folder,
            use_vllm=True,
            steps_per_generation=2,
            max_steps=2 * (SYNCED + 1),
            learning_rate=1e-3,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    trainer.add_callback(MoveTheWeights(trainer, SYNCED))
    trainer.train()
    generation = trainer.vllm_generation
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
    }


def check(seen: dict):
    """What the first rank returned: the engine had the trainer's weights as long as they were sent to it."""
    *synced, cut = seen["mean"]
    assert len(synced) == SYNCED
    assert max(synced) < 1e-4, seen
    assert cut > 1e-2, seen  # a sync that is cut does not pass for one
    assert sum(seen["nan_tokens"]) == 0
