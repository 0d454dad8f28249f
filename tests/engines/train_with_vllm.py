"""Train with vLLM's own engine in this process, cut the weight sync on the way, and write down what was seen.

Before each generation the trainer's weights are set to others, known beforehand, so that an engine without them is
seen to differ, whatever became of the policy in training.

Run by test_vllm.py, once for all its cases: each engine stays in memory until its process ends.

In all cases but the last the engine computes in float32, like the trainer, so that nothing but wrong weights can make
the two differ. The last is the engine as TRL starts it: bfloat16, and compiled.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import trl.generation.vllm_generation as vllm_generation
from datasets import Dataset
from peft import LoraConfig
from tiny import BASE, PROMPTS, logged, longer_is_better, make_args
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from vllm import SamplingParams
from vllm.model_executor.layers import utils

from fipo_trl import FIPOTrainer
from fipo_trl.evaluation.callback import EvaluationCallback


CASES = ("full-tied", "full-untied", "lora-tied", "lora-untied", "as-started-by-trl-tied")
SYNCED = 6  # generations of 8 updates each, before the one without a sync
NOISE = 0.5  # of each weight matrix's standard deviation


def save_base(folder: Path, tied: bool):
    """The tiny base model, with an output head of its own unless `tied`."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(1.3 * model.lm_head.weight.detach())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)


class MoveTheWeights(TrainerCallback):
    """After each generation: move the weights. Before the last synced one: compare completions, cut the sync."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.first = {name: weight.detach().clone() for name, weight in trained.items()}
        # LoRA's second matrices begin as zeros
        self.scale = {name: NOISE * (weight.std().item() or 0.1) for name, weight in self.first.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        generation, step = divmod(state.global_step, args.updates_per_generation)
        if step != 0:
            return
        generator = torch.Generator().manual_seed(int(generation))
        weights = dict(model.named_parameters())
        for name, first in self.first.items():
            if first.dim() == 2:  # norms and biases stay
                first = first + self.scale[name] * torch.randn(first.shape, generator=generator)
            weights[name].copy_(first)
        if generation == SYNCED - 1:
            evaluated = greedy_evaluation(self.trainer)  # which must bring the weights to the engine itself
            self.trainer.vllm_generation.sync_weights()
            engine, trainer = greedy_engine(self.trainer), greedy_trainer(self.trainer)
            self.greedy = {"engine": engine, "trainer": trainer, "evaluation": evaluated}
            self.trainer.vllm_generation.sync_weights = lambda: None


def greedy_engine(trainer) -> list[list[int]]:
    prompts = [{"prompt_token_ids": trainer.processing_class.encode(prompt)} for prompt in PROMPTS]
    outputs = trainer.vllm_generation.llm.generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=trainer.max_completion_length), use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def greedy_evaluation(trainer) -> list[list[int]]:
    """What EvaluationCallback samples where top-p leaves nothing to chance."""
    sampled = []

    def record(completion_ids, **kwargs):
        sampled.extend(completion_ids)
        return [0.0] * len(completion_ids)

    problems = {"x": Dataset.from_dict({"prompt": PROMPTS})}
    EvaluationCallback(trainer, problems, record, n=1, top_p=1e-6).evaluate("x")
    return sampled


@torch.no_grad()
def greedy_trainer(trainer) -> list[list[int]]:
    completions = []
    end = trainer.processing_class.eos_token_id
    for prompt in PROMPTS:
        ids = torch.tensor([trainer.processing_class.encode(prompt)])
        output = trainer.model.generate(input_ids=ids, do_sample=False, max_new_tokens=trainer.max_completion_length)
        completion = output[0, ids.shape[1] :].tolist()
        completions.append(completion[: completion.index(end) + 1] if end in completion else completion)
    return completions


def make_vllm_trainer(base: Path, folder: Path, peft_config=None, **settings) -> FIPOTrainer:
    return FIPOTrainer(
        model=str(base),
        reward_funcs=longer_is_better,
        args=make_args(
            folder,
            use_vllm=True,
            vllm_max_model_length=64,
            per_device_train_batch_size=8,
            max_steps=8 * (SYNCED + 1),
            learning_rate=1e-4,
            eval_steps=8,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=peft_config,
    )


def run(case: str, folder: Path) -> dict:
    base = folder / case
    save_base(base, tied=case.endswith("-tied"))
    peft_config = LoraConfig(r=4, target_modules="all-linear") if case.startswith("lora") else None
    began = time.perf_counter()
    trainer = make_vllm_trainer(base, folder, peft_config)
    start = time.perf_counter() - began
    move = MoveTheWeights()
    move.trainer = trainer
    trainer.add_callback(move)
    trainer.train()
    return {
        "gemm": utils.dispatch_cpu_unquantized_gemm.__qualname__,
        "serves_adapter": trainer.vllm_generation.serves_adapter,
        "dtype": str(trainer.vllm_generation.llm.llm_engine.model_config.dtype),
        "mean": logged(trainer, "engine_mismatch/mean"),
        "max": logged(trainer, "engine_mismatch/max"),
        "nan_tokens": logged(trainer, "engine_mismatch/nan_tokens"),
        "greedy": move.greedy,
        "finite": all(parameter.isfinite().all().item() for parameter in trainer.model.parameters()),
        "seconds": {"start": start, "train": time.perf_counter() - began - start},
    }


def too_short_a_context(folder: Path) -> str:
    """What the trainer says to a context of the engine that holds the longest completion, but not with its prompt."""
    base = folder / "full-tied"
    try:
        make_vllm_trainer(base, folder, max_completion_length=60)
    except ValueError as error:
        return str(error)


def main(folder: Path):
    engine = vllm_generation.LLM
    results = {}
    for case in CASES:
        as_is = case.startswith("as-started-by-trl")
        vllm_generation.LLM = engine if as_is else partial(engine, dtype="float32", enforce_eager=True)
        results[case] = run(case, folder)
    vllm_generation.LLM = partial(engine, enforce_eager=True)
    results["too_short_a_context"] = too_short_a_context(folder)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
