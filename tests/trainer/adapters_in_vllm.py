"""Give adapters to vLLM's own engine in this process, and write down what it and the trainer's model answer.

Run by test_lora_sync.py, once for all its cases. The engine computes in float32, like the trainer.
"""

import json
import logging
import sys
from functools import partial
from pathlib import Path

import torch
import trl.generation.vllm_generation as vllm_generation
from datasets import Dataset
from four_heads import save_four_heads
from peft import LoraConfig
from tiny import PROMPTS, longer_is_better, make_args
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from fipo_trl import FIPOTrainer
from fipo_trl.trainer import lora_sync


PATTERNS = {"rank_pattern": {"q_proj": 2, "down_proj": 11}, "alpha_pattern": {"q_proj": 5, "o_proj": 1}}
CASES = {
    "rslora": {"r": 4, "lora_alpha": 7, "use_rslora": True},
    "patterns": {"r": 4, **PATTERNS},
    "other-base": {"r": 16},
    "dora": {"r": 4, "use_dora": True},
    "unknown": {"r": 4},  # to vLLM: see `run`
    "merged": {"r": 4},  # by `vllm_merge_lora`
}
ADAPTERS = 4
LONG = "".join(PROMPTS[i].replace("=", "") for i in range(20)) + "="  # several blocks of the cache


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage().removeprefix("[RANK 0] "))


def make_trainer(base: Path, folder: Path, model, settings: dict, **arguments) -> FIPOTrainer:
    return FIPOTrainer(
        model=model or str(base),
        reward_funcs=longer_is_better,
        args=make_args(folder, use_vllm=True, vllm_max_model_length=200, **arguments),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(**{"target_modules": "all-linear"} | settings),
    )


@torch.no_grad()
def draw_adapter(model, seed: int):
    """One that answers otherwise."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_magnitude" not in name:
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


@torch.no_grad()
def greedy(trainer) -> list[int]:
    ids = torch.tensor([trainer.processing_class.encode(LONG)])
    output = trainer.model.generate(input_ids=ids, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    return output[0, ids.shape[1] :].tolist()


def asked(engine, trainer, **adapter):
    """The engine's greedy completion, and how many tokens of the prompt it had in its cache."""
    prompt = {"prompt_token_ids": trainer.processing_class.encode(LONG)}
    settings = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=12)
    (output,) = engine.generate([prompt], settings, use_tqdm=False, **adapter)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def count_bytes(engine) -> list[int]:
    """A number to which all is added that goes into the engine, from now on."""
    moved = [0]
    model = engine.llm_engine.model_executor.driver_worker.model_runner.model
    load_weights = model.load_weights
    serve = getattr(engine, "serve", None)

    def counted_load(weights):
        weights = list(weights)
        moved[0] += sum(weight.nbytes for _, weight in weights)
        return load_weights(weights)

    def counted_serve(adapter):
        moved[0] += sum(matrix.nbytes for matrix in adapter.values())
        serve(adapter)

    model.load_weights = counted_load
    if serve:
        engine.serve = counted_serve
    return moved


def run(case: str, folder: Path) -> dict:
    base = folder / case
    save_four_heads(base)
    model = None
    if case == "other-base":  # than the one that vLLM finds under its name
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
    listener = Lines()
    logger = logging.getLogger("fipo_trl.trainer.lora_sync")
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    known = lora_sync.served_modules
    if case == "unknown":
        lora_sync.served_modules = lambda runner: known(runner) - {"model.layers.1.mlp.down_proj"}
    trainer = make_trainer(base, folder, model, CASES[case], vllm_merge_lora=case == "merged")
    lora_sync.served_modules = known
    logger.removeHandler(listener)
    generation = trainer.vllm_generation
    seen = {"log": listener.lines, "trainer": [], "engine": [], "bytes": [], "cached": {"new": [], "again": []}}
    if generation.serves_adapter:
        try:
            asked(generation.llm, trainer)
        except RuntimeError as error:
            seen["too_early"] = str(error)
        generation.llm.reset_prefix_cache = lambda: None
    moved = count_bytes(generation.llm)
    named = dict(trainer.model.named_parameters())
    trained = {name for name, weight in named.items() if weight.requires_grad}
    seen["base_bytes"] = sum(weight.nbytes for name, weight in named.items() if name not in trained)
    seen["adapter_bytes"] = sum(named[name].nbytes for name in trained)
    seen["unchanged"] = True
    for number in range(ADAPTERS):
        draw_adapter(trainer.model, number)
        before = {name: weight.detach().clone() for name, weight in named.items()}
        moved[0] = 0
        generation.sync_weights()
        seen["bytes"].append(moved[0])
        completion, cached = asked(generation.llm, trainer)
        again, cached_again = asked(generation.llm, trainer)
        assert again == completion
        seen["engine"].append(completion)
        seen["trainer"].append(greedy(trainer))
        seen["cached"]["new"].append(cached)
        seen["cached"]["again"].append(cached_again)
        seen["unchanged"] &= all(torch.equal(weight, before[name]) for name, weight in named.items())
    if case == "rslora":
        try:
            asked(generation.llm, trainer, lora_request=LoRARequest("adapter-1", 1, "in the memory of the trainer"))
        except Exception as error:
            seen["gone"] = type(error).__name__
    return seen


def main(folder: Path):
    engine = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True, block_size=32)
    vllm_generation.LLM = engine
    results = {case: run(case, folder) for case in CASES}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
