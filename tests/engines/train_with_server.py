"""Train with a vLLM server, cut the weight sync on the way, and return what was seen. Run by test_vllm_server.py."""

from cpu_ranks import held
from moved_weights import MoveTheWeights
from peft import LoraConfig
from tiny import BASE, PROMPTS, Dataset, logged, longer_is_better, make_args

from fipo_trl import FIPOTrainer


SYNCED = 3  # generations, before the one without a sync


def train(folder: str, lora: bool, server_port: int, group_port: int) -> dict:
    trainer = FIPOTrainer(
        model=BASE,
        reward_funcs=longer_is_better,
        args=make_args(
            folder,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_host="127.0.0.1",
            vllm_server_port=server_port,
            vllm_group_port=group_port,
            steps_per_generation=2,
            max_steps=2 * (SYNCED + 1),
            learning_rate=1e-3,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    trainer.add_callback(MoveTheWeights(trainer, SYNCED))
    trainer.train()
    return {
        "held": held(trainer),
        "mean": logged(trainer, "engine_mismatch/mean"),
        "max": logged(trainer, "engine_mismatch/max"),
        "nan_tokens": logged(trainer, "engine_mismatch/nan_tokens"),
    }
