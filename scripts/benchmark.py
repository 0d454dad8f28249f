"""What FIPO costs, in time and memory, on this machine. Random weights and stubbed completions: nothing is downloaded.

    OMP_NUM_THREADS=2 python scripts/benchmark.py future-kl
    OMP_NUM_THREADS=2 python scripts/benchmark.py update
    OMP_NUM_THREADS=1 python scripts/benchmark.py step
    OMP_NUM_THREADS=2 python scripts/benchmark.py memory
    OMP_NUM_THREADS=2 python scripts/benchmark.py monitoring
    OMP_NUM_THREADS=1 python scripts/benchmark.py evaluation
    python scripts/benchmark.py dynamic-sampling
    python scripts/benchmark.py code-reward
    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 python scripts/benchmark.py lora-sync
    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 python scripts/benchmark.py lora-sync --server

`future-kl` times Future-KL against the matrix product of the official code, a serial scan and one pass of `exp`;
`update` times optimizer updates of TRL's GRPOTrainer and of FIPOTrainer on the same completions, of equal and of
long-tailed lengths; `step` times whole training steps of both, and what they consist of; `memory` measures what the
influence weights add to an update, `monitoring` what metrics and collapse alarm add; `evaluation` times the answers to
the tiny task's held-out problems, in batches of several sizes; `dynamic-sampling` counts, without a model, how many
groups are sampled for one that is trained on, also where earlier epochs are remembered; `code-reward` times programs
in the sandbox and out of it, and the reward over answers that take long; `lora-sync` brings a LoRA adapter to vLLM, as
it is and merged into the weights: bytes, time, and how far the engine is from the trainer then. It needs vLLM. With
`--server` the engine is a server of its own, on the CPU.
All that a row compares takes turns in the same run, and a time is the median of these rounds. Other load spoils the
times: look at `uptime` first. With `--quick` every subcommand takes seconds (`lora-sync`, which starts four engines,
minutes), to see that it works; its times mean nothing.
"""

import argparse
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import NormalDist, mean, median

import torch
import transformers
import trl
from accelerate.utils.other import get_free_port
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback
from trl import GRPOTrainer
from trl.generation import vllm_generation

from fipo_trl import DAPOConfig, DAPOTrainer, FIPOConfig, FIPOTrainer
from fipo_trl.analysis.collapse import CollapseAlarm
from fipo_trl.commands.vllm_server_command import vllm_server_command
from fipo_trl.data.sources import load_splits
from fipo_trl.evaluation.exam import Exam, metrics_of
from fipo_trl.evaluation.sampling import transformers_sampler
from fipo_trl.objective.future_kl import future_kl
from fipo_trl.objective.influence import influence_weights
from fipo_trl.recipe.validate import read_and_validate
from fipo_trl.rewards.code_tests import code_accuracy, code_reward, outcomes
from fipo_trl.rewards.names import load_reward
from fipo_trl.rewards.sandbox import Sandbox, at_once
from fipo_trl.trainer.dynamic_sampling import DynamicSampler, PromptStream
from fipo_trl.trainer.prompt_history import LEAST, PromptHistory


TINY_BASE = Path(__file__).parents[1] / "recipes/tiny/base"
HALF_LIFE = 32.0  # tokens
BLOCK = 128  # keys per matrix product in the official code
GENERATIONS = 16  # completions of a group, where only their rewards are simulated
UPDATES_PER_GENERATION = 2  # in the first every influence weight is 1; in the second FIPO acts


# Measuring


def medians(functions: dict, rounds: dict[str, int], device: str) -> dict[str, float]:
    """Median seconds of each function, after a warm-up. They take turns: each runs once in a round, on the same seed.

    `rounds` are given by name: who has fewer runs sits out, evenly.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    total = max(rounds.values())
    times = {name: [] for name in functions}
    for turn in range(-1, total):
        for name, function in functions.items():
            if turn >= 0 and turn * rounds[name] % total >= rounds[name]:
                continue
            torch.manual_seed(turn + 1)
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def peak_bytes(function, device: str) -> int:
    """The most memory that `function` holds at once beyond what was there before, its results included."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


# future-kl


def block_sum(log_ratio):
    """Future-KL as the official code sums it: (B, K) @ (K, T) for each block of K keys. `log_ratio` (B, T), masked."""
    dtype = torch.promote_types(log_ratio.dtype, torch.float32)
    positions = torch.arange(log_ratio.shape[1], device=log_ratio.device, dtype=dtype)
    sums = torch.zeros_like(log_ratio)
    for values, keys in zip(log_ratio.split(BLOCK, dim=1), positions.split(BLOCK), strict=True):
        distance = keys.unsqueeze(1) - positions  # (K, T)
        decay = torch.where(distance >= 0, 2.0 ** (-distance.clamp(min=0) / HALF_LIFE), 0.0)
        sums += values @ decay.to(log_ratio.dtype)
    return sums


def serial_scan(log_ratio):
    """Future-KL as its recurrence reads, token by token. `log_ratio` (B, T), masked."""
    sums = log_ratio.clone()
    columns = sums.unbind(dim=1)
    for t in reversed(range(len(columns) - 1)):
        columns[t].add_(columns[t + 1], alpha=2.0 ** (-1.0 / HALF_LIFE))
    return sums


def run_future_kl(args):
    rows = []
    for shape in progress(args.shapes):
        B, T, dtype = shape.split("x")
        B, T, dtype = int(B), int(T), getattr(torch, dtype)
        torch.manual_seed(0)
        mask = torch.rand(B, T, device=args.device) < 0.9
        log_ratio = (0.1 * torch.randn(B, T, device=args.device)).to(dtype)
        masked = log_ratio.masked_fill(~mask, 0.0)
        functions = {
            "ours": partial(future_kl, log_ratio, mask, half_life=HALF_LIFE),
            "block sum": partial(block_sum, masked),
            "serial scan": partial(serial_scan, masked),
            "one exp": partial(torch.exp, log_ratio),
        }
        if args.longest_block_sum < T:
            del functions["block sum"]
        slow = dict.fromkeys(["block sum", "serial scan"], args.slow_rounds)
        times = medians(functions, dict.fromkeys(functions, args.rounds) | slow, args.device)
        exact = serial_scan(masked.double())
        row = {"B x T": f"{B} x {T}", "dtype": shape.split("x")[-1]}
        row |= {f"{name}, ms": against(times, name, "ours") for name in ("ours", *slow, "one exp")}
        for name in ("ours", *slow):
            row[f"error, {name}"] = f"{(functions[name]() - exact).abs().max():.0e}" if name in functions else "-"
        rows.append(row)
    report(rows, "(x ratio): over ours. Errors: largest absolute difference from a serial scan in float64.")


# update


class TrimmingOnly(FIPOTrainer):
    """Each micro-batch, and each chunk of the old-log-prob pass, is cut to its own longest row; none is sorted."""

    def _what_ties_rows(self):
        return ["a benchmark"]

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, batch_size=None, **kwargs):
        log_probs = super()._get_per_token_logps_and_entropies
        if batch_size is None:
            return log_probs(model, input_ids, attention_mask, *args, **kwargs)
        # FIPOTrainer sorts what it is given: one chunk at a time leaves it nothing to sort
        chunks = zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
        values = [log_probs(model, *chunk, *args, batch_size=batch_size, **kwargs)[0] for chunk in chunks]
        return torch.cat(values), None, None


TRAINERS = {  # name: class, group_by_length
    "FIPOTrainer": (FIPOTrainer, True),
    "GRPOTrainer": (GRPOTrainer, False),
    "ungrouped": (FIPOTrainer, False),
    "trimmed": (TrimmingOnly, True),
}
DYNAMIC = "FIPOTrainer, dynamic sampling"
STEPS = {DYNAMIC: (FIPOTrainer, True)} | {name: TRAINERS[name] for name in ("FIPOTrainer", "GRPOTrainer")}
MONITORED = {"FIPOTrainer": (FIPOTrainer, True), "DAPOTrainer": (DAPOTrainer, True)}


def make_model():
    """A Qwen2 of 0.3M random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 32768}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_BASE, **sizes))


def make_lengths(distribution: str, number: int, longest: int, spread: float) -> list[int]:
    """Completion lengths, in tokens. Long-tailed ones are evenly spaced quantiles of a log-normal distribution."""
    if distribution == "equal":
        return [longest] * number
    logs = [NormalDist(sigma=spread).inv_cdf((i + 0.5) / number) for i in range(number)]
    return [max(1, round(longest * math.exp(log - logs[-1]))) for log in logs]


def mean_letter(completions, **kwargs):
    """A reward that differs between completions."""
    return [sum(map(ord, completion)) / len(completion) for completion in completions]


class Cycle:
    """A trainer, and what it does on each generation: stubbed rollouts, the old-log-prob pass, the updates."""

    def __init__(self, name, distribution, micro_batch_size, args, folder, model=None, **settings):
        trainer_class, group_by_length = (TRAINERS | MONITORED | STEPS)[name]
        tokenizer = AutoTokenizer.from_pretrained(TINY_BASE, padding_side="left")
        self.lengths = make_lengths(distribution, UPDATES_PER_GENERATION * args.sequences, args.longest, args.spread)
        self.trainer = trainer_class(
            model=model or make_model(),
            reward_funcs=mean_letter,
            # A FIPOConfig is a GRPOConfig, too: one objective and one optimizer for all
            args=(DAPOConfig if trainer_class is DAPOTrainer else FIPOConfig)(
                output_dir=folder,
                per_device_train_batch_size=micro_batch_size,
                gradient_accumulation_steps=args.sequences // micro_batch_size,
                steps_per_generation=len(self.lengths) // micro_batch_size,
                num_generations=4,
                max_completion_length=args.longest,
                max_steps=1,
                learning_rate=1e-4,
                group_by_length=group_by_length,
                dynamic_sampling=name == DYNAMIC,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1,
                use_cpu=args.device == "cpu",
                **{"bf16": False, "gradient_checkpointing": False} | settings,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a1b2c3="] * len(self.lengths)}),
            processing_class=tokenizer,
            rollout_func=self.rollouts,
        )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = self.trainer.args.gradient_accumulation_steps
        self.trainer.model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.prompts = next(iter(self.trainer.get_train_dataloader()))
        self.positions = self.tokens = 0  # computed by the updates, and those of them that are not padding

    def rollouts(self, prompts, trainer):
        """TRL's `rollout_func`: random tokens, lengths in random order; the same for all trainers."""
        tokenizer = trainer.processing_class
        completions = [
            [*torch.randint(2, len(tokenizer), (self.lengths[i] - 1,)).tolist(), tokenizer.eos_token_id]
            for i in torch.randperm(len(prompts)).tolist()
        ]
        prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

    def count(self, model, args, kwargs):
        if torch.is_grad_enabled():
            self.positions += kwargs["attention_mask"].numel()
            self.tokens += kwargs["attention_mask"].sum()

    def __call__(self):
        trainer = self.trainer
        for step in range(1, trainer.args.steps_per_generation + 1):
            last = step % trainer.args.gradient_accumulation_steps == 0
            trainer.accelerator.gradient_state._set_sync_gradients(last)
            trainer.training_step(trainer.model, self.prompts, None)
            if last:
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()


def run_update(args):
    rows = []
    for distribution, size in progress(product(args.lengths, args.micro_batches)):
        with tempfile.TemporaryDirectory() as folder:
            cycles = {name: Cycle(name, distribution, size, args, folder) for name in TRAINERS}
        times = medians(cycles, dict.fromkeys(cycles, args.rounds), args.device)
        times = {name: value / UPDATES_PER_GENERATION for name, value in times.items()}
        lengths = cycles["FIPOTrainer"].lengths
        row = {
            "lengths": distribution,
            "mean/longest": f"{mean(lengths) / max(lengths):.2f}",
            "micro-batch": str(size),
        }
        row |= {f"{name}, s": against(times, name, "FIPOTrainer", scale=1) for name in TRAINERS}
        row["not padding"] = ", ".join(f"{float(cycle.tokens / cycle.positions):.2f}" for cycle in cycles.values())
        rows.append(row)
    report(
        rows,
        f"Seconds per optimizer update of {args.sequences} sequences, longest completion {args.longest} tokens, and "
        f"(x ratio) over FIPOTrainer.\nTimed: generations of {UPDATES_PER_GENERATION} updates with stubbed rollouts; "
        "old-log-prob pass, rewards and optimizer included.\nFIPOTrainer sorts and cuts. ungrouped: it with "
        "group_by_length=False. trimmed: micro-batches and the chunks of the\nold-log-prob pass are cut, not sorted. "
        "Not padding: share of the tokens that updates computed, in column order.",
    )


# step


class ForcedLengths(LogitsProcessor):
    """Ends each row at a length of its own, and not before: (B,) lengths in tokens, EOS included."""

    def __init__(self, lengths: list[int], prompt_length: int, eos_token_id: int):
        self.lengths, self.prompt_length, self.eos_token_id = torch.tensor(lengths), prompt_length, eos_token_id

    def __call__(self, input_ids, scores):
        ends = self.lengths.to(scores.device) == input_ids.shape[1] - self.prompt_length + 1
        eos = scores[:, self.eos_token_id].clone()
        scores[:, self.eos_token_id] = -math.inf
        scores[ends] = -math.inf
        scores[ends, self.eos_token_id] = eos[ends]
        return scores


class Step(Cycle, TrainerCallback):
    """Trains for some generations as a user would, and adds up what takes how long.

    Completions are really sampled, and end at lengths that are given; which tokens is left to the policy.
    """

    PARTS = ("generation", "scoring", "old log-probs", "update")

    def __init__(self, name, distribution, args, folder):
        super().__init__(name, distribution, args.micro_batch, args, folder)
        trainer = self.trainer
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        trainer.args.max_steps = UPDATES_PER_GENERATION * args.generations
        trainer.rollout_func = partial(self.clocked, "generation", self.sample)
        for part, method in {
            "scoring": "_calculate_rewards",
            "old log-probs": "_get_per_token_logps_and_entropies",
            "update": "compute_loss",
        }.items():
            setattr(trainer, method, partial(self.clocked, part, getattr(trainer, method)))
        trainer.accelerator.backward = partial(self.clocked, "update", trainer.accelerator.backward)
        trainer.optimizer.step = partial(self.clocked, "update", trainer.optimizer.step)
        self.inside = False
        self.rounds: list[dict[str, float]] = []  # seconds

    def clocked(self, part, function, *args, **kwargs):
        if self.inside:  # the forward pass of a loss is part of the update
            return function(*args, **kwargs)
        self.inside = True
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.rounds[-1][part] += time.perf_counter() - start
            self.inside = False

    def sample(self, prompts, trainer):
        tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
        order = torch.randperm(len(prompts)).tolist()
        lengths = [self.lengths[i % len(self.lengths)] for i in order]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(trainer.accelerator.device)
        start = inputs["input_ids"].shape[1]
        forced = ForcedLengths(lengths, start, tokenizer.eos_token_id)
        with torch.no_grad():
            tokens = model.generate(
                **inputs,
                do_sample=True,
                max_new_tokens=max(lengths),
                logits_processor=LogitsProcessorList([forced]),
                pad_token_id=tokenizer.pad_token_id,
            )[:, start:].tolist()
        return {
            "prompt_ids": [tokenizer.encode(prompt) for prompt in prompts],
            "completion_ids": [row[:length] for row, length in zip(tokens, lengths, strict=True)],
            "logprobs": None,
        }

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.rounds.append(dict.fromkeys(self.PARTS, 0.0))
            self.began = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.rounds[-1]["total"] = time.perf_counter() - self.began

    def __call__(self):
        self.trainer._step = 0
        self.trainer.train()

    def medians(self) -> dict[str, float]:
        """Seconds of a generation and its updates, without the warm-up."""
        generations = self.trainer.args.max_steps / UPDATES_PER_GENERATION
        times = {name: median(each[name] for each in self.rounds[1:]) / generations for name in self.rounds[0]}
        other = median(each["total"] - sum(each[part] for part in self.PARTS) for each in self.rounds[1:])
        total = times.pop("total")
        return times | {"other": other / generations, "total": total}


def run_step(args):
    rows = []
    for distribution in progress(args.lengths):
        with tempfile.TemporaryDirectory() as folder:
            steps = {name: Step(name, distribution, args, folder) for name in STEPS}
            medians(steps, dict.fromkeys(steps, args.rounds), args.device)
        times = {name: step.medians() for name, step in steps.items()}
        for name, parts in times.items():
            row = {"lengths": distribution, "trainer": name}
            row |= {part: f"{seconds:.3f}" for part, seconds in parts.items()}
            rows.append(row | {"of GRPO's": f"{parts['total'] / times['GRPOTrainer']['total']:.2f}"})
    report(
        rows,
        f"Seconds of a training step: a generation of {UPDATES_PER_GENERATION * args.sequences} completions, the "
        f"longest of {args.longest} tokens, and its {UPDATES_PER_GENERATION} updates, by `train()`,\nwith a log after "
        f"each. Medians of {args.rounds} rounds of {args.generations} generations. Completions are sampled by the "
        "trainer's model with transformers;\ntheir lengths are given. Other: decoding, padding, advantages, metrics, "
        "logs, sorting by length, clipping, the data loader.",
    )


# monitoring


class MonitoredCycle(Cycle):
    """A cycle that logs a row after each update, with the collapse alarm, and adds up what monitoring takes of it.

    CPU time, because other load on the machine changes a time by more than monitoring does.
    """

    def __init__(self, name, *args):
        super().__init__(name, *args)
        self.trainer.remove_callback(PrinterCallback)
        alarm = CollapseAlarm()
        self.trainer.add_callback(alarm)
        parts = [(self.trainer, "_log_generation"), (alarm, "on_log")]
        if name == "DAPOTrainer":  # in FIPOTrainer these make the weights
            parts += [(self.trainer, "_weight_advantages"), (self.trainer, "_finish_update")]
        for owner, part in parts:
            setattr(owner, part, partial(self.clocked, getattr(owner, part)))
        self.trainer.optimizer.register_step_post_hook(lambda *_: self.trainer.log({"loss": 0.0, "grad_norm": 0.1}))
        self.monitoring, self.all = [], []  # seconds of CPU time per cycle

    def clocked(self, function, *args, **kwargs):
        start = time.process_time()
        result = function(*args, **kwargs)
        self.monitoring[-1] += time.process_time() - start
        return result

    def __call__(self):
        self.monitoring.append(0.0)
        start = time.process_time()
        super().__call__()
        self.all.append(time.process_time() - start)


def run_monitoring(args):
    rows = []
    for distribution, size in progress(product(args.lengths, args.micro_batches)):
        with tempfile.TemporaryDirectory() as folder:
            cycles = {name: MonitoredCycle(name, distribution, size, args, folder) for name in MONITORED}
        medians(cycles, dict.fromkeys(cycles, args.rounds), args.device)
        row = {"lengths": distribution, "micro-batch": str(size)}
        for name, cycle in cycles.items():
            spent, total = median(cycle.monitoring[1:]), median(cycle.all[1:])  # without the warm-up
            row[f"{name}, ms"] = f"{1e3 * total / UPDATES_PER_GENERATION:.0f}"
            row[f"{name}: monitoring, ms"] = f"{1e3 * spent / UPDATES_PER_GENERATION:.2f}"
            row[f"{name}: share"] = f"{spent / total:.2%}"
        rows.append(row)
    report(
        rows,
        f"CPU time per optimizer update of {args.sequences} sequences, longest completion {args.longest} tokens, and "
        "what monitoring takes\nof it: lengths, behaviours and the collapse alarm, a row per update; in DAPO, policy "
        "KL and dual clips too. As in `update`,\nrollouts are stubbed; real ones would make the share smaller.",
    )


# memory


def run_memory(args):
    rows = []
    model = make_model().to(args.device)
    for shape in progress(args.shapes):
        B, T = map(int, shape.split("x"))
        torch.manual_seed(0)
        input_ids = torch.randint(model.config.vocab_size, (B, T), device=args.device)
        log_ratio = 0.1 * torch.randn(B, T, device=args.device)
        advantages = torch.randn(B, device=args.device)
        mask = torch.ones_like(input_ids)
        weigh = partial(influence_weights, log_ratio, advantages, mask)
        functions = {"weights": weigh, "model": lambda ids=input_ids: model(ids, labels=ids).loss.backward()}
        if args.most_tokens < B * T:
            del functions["model"]
        times = medians(functions, {"weights": args.rounds, "model": args.slow_rounds}, args.device)
        row = {"B x T": f"{B} x {T}"}
        row["peak, (B, T) float32"] = f"{peak_bytes(weigh, args.device) / (4 * B * T):.1f}"
        row["influence_weights, ms"] = f"{1e3 * times['weights']:.2f}"
        row["model, ms"] = against(times, "model", "weights")
        row["share"] = f"{times['weights'] / times['model']:.2%}" if "model" in times else "-"
        rows.append(row)
    report(
        rows,
        "Peak: of influence_weights beyond its inputs, results included. Model: forward and backward of a Qwen2 of\n"
        "0.3M weights. Share: influence_weights over model.",
    )


# Evaluation


def run_evaluation(args):
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE).eval().to(args.device)
    columns = load_splits(str(TINY_BASE.parent / "data"))["test"][: args.problems]
    prompt_ids = tokenizer(columns["prompt"])["input_ids"]
    accuracy_of = load_reward("running_sums.exact_answer", folder=str(TINY_BASE.parent))
    exam = Exam(columns, prompt_ids, accuracy_of, tokenizer, [tokenizer.eos_token_id])
    max_tokens = model.config.max_position_embeddings - max(map(len, prompt_ids))
    sampler = transformers_sampler(model, exam.end_ids, temperature=1.0, top_p=args.top_p, max_tokens=max_tokens)
    accuracy = {size: [] for size in args.batch_sizes}

    def answer(size):
        batches = exam.answers(sampler, args.samples, size, torch.initial_seed())
        samples = [row for batch in batches for row in batch.values()]
        accuracy[size].append(metrics_of(samples, exam.has_answers)[f"avg@{args.samples}"].mean())

    functions = {size: partial(answer, size) for size in args.batch_sizes}
    times = medians(functions, dict.fromkeys(functions, args.rounds), args.device)
    rows = []
    for size in args.batch_sizes:
        row = {"batch_size": str(size), "s": f"{times[size]:.2f}"}
        row["times as fast"] = f"{times[args.batch_sizes[0]] / times[size]:.1f}"
        row[f"avg@{args.samples}"] = f"{mean(accuracy[size]):.1%}"
        rows.append(row)
    report(
        rows,
        f"{len(prompt_ids)} problems x {args.samples} answers of the tiny base model, with transformers at top-p "
        f"{args.top_p}. A batch_size of\n{args.samples} is one problem at a time. The accuracy is that of all rounds.",
    )


# Dynamic sampling


def run_dynamic_sampling(args):
    """Groups sampled per group trained on, where each group is mixed with the same probability."""

    def cell(keep_rate: float, oversample: float | str) -> str:
        generator = torch.Generator().manual_seed(0)

        def roll_out(rows):
            rewards = torch.zeros(len(rows), 2, 1)
            rewards[:, 0, 0] = (torch.rand(len(rows), generator=generator) < keep_rate).float()
            return rewards, [{} for _ in rows]

        sampler = DynamicSampler(PromptStream(17_000, seed=0), args.prompts, oversample=oversample)
        batches = [sampler.fill(roll_out) for _ in range(args.rounds)]
        if any(batch.fillers for batch in batches):
            return "rounds ran out"
        sampled = mean(batch.generated for batch in batches) / args.prompts
        return f"{sampled:.2f} ({mean(batch.rounds for batch in batches):.1f})"

    rows = []
    for tenths in progress(range(1, 10)):
        rate = tenths / 10
        row = {"keep rate": f"{rate:.1f}", "least possible": f"{1 / rate:.2f}"}
        for name, oversample in {"auto": "auto", "3x (DAPO)": 3.0, "4x (FIPO)": 4.0}.items():
            row[name] = cell(rate, oversample)
        rows.append(row)
    report(
        rows,
        f"Groups sampled per group trained on, and in brackets the rounds per batch of {args.prompts} groups: means\n"
        f"of {args.rounds} batches. The keep rate is the share of prompts whose completions differ in reward.",
    )
    print()
    run_skipping(args)


class LearnablePrompts:
    """Prompts of different difficulty under a policy that learns: in place of a model, pass rates that rise.

    The log-odds of a prompt's pass rate are normal over the prompts. They rise over the run, and wander a little.
    """

    def __init__(self, rows: int, generations: int, spread: float):
        self.generator = torch.Generator().manual_seed(0)
        self.rise = 3.0 / generations
        self.log_odds = spread * self.normal(rows) - 1.5
        self.streaks = torch.zeros(rows)  # visits in a row that were not mixed
        self.waiting: dict[int, int] = {}  # row: where the stream stood when the prompt became worth a visit
        self.waited: list[int] = []  # positions of the stream that went by, until there was one

    def normal(self, rows):
        return torch.randn(rows, generator=self.generator)

    def learn(self, position: int):
        """One generation. `position`: where the stream stands."""
        self.log_odds += self.rise + 0.03 * self.normal(len(self.log_odds))
        rates = self.log_odds.sigmoid()
        mixed = 1 - rates**GENERATIONS - (1 - rates) ** GENERATIONS
        for row in ((self.streaks >= 3) & (mixed > 0.5)).nonzero()[:, 0].tolist():
            self.waiting.setdefault(row, position)

    def roll_out(self, rows):
        rates = self.log_odds[rows].sigmoid().expand(GENERATIONS, -1)
        rewards = torch.bernoulli(rates, generator=self.generator).T.unsqueeze(2)
        return rewards, [{} for _ in rows]

    def visit(self, position: int, visits):
        """Of the generation before: (row, whether it was mixed)."""
        for row, mixed in visits:
            self.streaks[row] = 0 if mixed else self.streaks[row] + 1
            if row in self.waiting:
                self.waited.append(position - self.waiting.pop(row))


class PosteriorHistory(PromptHistory):
    """A rival of GRESO's rule: a prompt is sampled with the probability that its next group is mixed.

    The pass rate has a Beta posterior, of a uniform prior and the completions seen. With each visit those before count
    half as much.
    """

    def __init__(self, rows: int):
        super().__init__(rows)
        self.right: dict[int, float] = {}  # row: completions that were right at its latest visit
        self.seen = torch.zeros(rows, 2)  # completions, right and wrong

    def probability(self, row: int) -> float:
        right, wrong = self.seen[row].tolist()
        if right + wrong == 0:
            return 1.0
        same = [
            math.exp(math.lgamma(1 + n + GENERATIONS) + math.lgamma(2 + right + wrong))
            / math.exp(math.lgamma(1 + n) + math.lgamma(2 + right + wrong + GENERATIONS))
            for n in (right, wrong)
        ]
        return max(1 - sum(same), LEAST)

    def record(self, visits, follow_target: bool) -> int:
        for row, _ in (visits := list(visits)):
            self.seen[row] = self.seen[row] / 2 + torch.tensor([self.right[row], GENERATIONS - self.right[row]])
        return super().record(visits, follow_target)


def simulate_epochs(history: PromptHistory | None, args) -> tuple[list[dict[str, float]], list[float]]:
    """Sums of what each epoch took, and the epochs that prompts worth a visit waited for one."""
    rows = args.rows
    sampler = DynamicSampler(PromptStream(rows, seed=0), args.prompts)
    sampler.history = history
    task = LearnablePrompts(rows, args.generations, args.spread)
    epochs: list[dict[str, float]] = []
    for _ in range(args.generations):
        start = sampler.position
        task.learn(start)
        seen = []

        def roll_out(asked, seen=seen):
            rewards, rollouts = task.roll_out(asked)
            if isinstance(history, PosteriorHistory):
                history.right |= zip(asked, rewards.sum(dim=(1, 2)).tolist(), strict=True)
            seen += zip(asked, (rewards.amax(dim=(1, 2)) > rewards.amin(dim=(1, 2))).tolist(), strict=True)
            return rewards, rollouts

        batch = sampler.fill(roll_out)
        task.visit(start, seen)
        if start // rows == len(epochs):
            epochs.append(dict.fromkeys(("generated", "kept", "skipped", "revived"), 0.0))
        for name in epochs[-1]:
            epochs[-1][name] += batch.metrics().get(name, 0.0)
        epochs[-1] |= {name: batch.skipping[name] for name in ("p_easy", "p_hard") if history}
    return epochs, sorted(waited / rows for waited in task.waited)


def run_skipping(args):
    """Epoch by epoch, what is sampled with and without the prompts that GRESO's rule skips, or its rival's."""
    histories = (None, PromptHistory(args.rows), PosteriorHistory(args.rows))
    (auto, skip, posterior), waits = zip(*(simulate_epochs(history, args) for history in histories), strict=True)

    def per_kept(epochs):
        return f"{sum(e['generated'] for e in epochs) / sum(e['kept'] for e in epochs):.2f}"

    rows = []
    for number in range(max(map(len, (auto, skip, posterior)))):
        here = skip[number] if number < len(skip) else None
        rows.append(
            {
                "epoch": str(number + 1),
                "auto": per_kept(auto[number : number + 1]) if number < len(auto) else "-",
                "skip": per_kept([here]) if here else "-",
                "posterior": per_kept(posterior[number : number + 1]) if number < len(posterior) else "-",
                "skipped": f"{here['skipped'] / args.rows:.2f}" if here else "-",
                "revived": f"{here['revived']:.0f}" if here else "-",
                "p_easy": f"{here['p_easy']:.2f}" if here else "-",
                "p_hard": f"{here['p_hard']:.2f}" if here else "-",
            }
        )
    sums = {"auto": per_kept(auto), "skip": per_kept(skip), "posterior": per_kept(posterior)}
    rows.append(dict.fromkeys(rows[0], "") | {"epoch": "all"} | sums)
    median_and_most = [
        f"{median(found):.1f}, {found[int(0.9 * len(found))]:.1f}" if found else "none waited" for found in waits
    ]
    report(
        rows,
        f"Groups sampled per group trained on, by epoch: {args.rows} prompts, {args.generations} generations of "
        f"{args.prompts} groups of {GENERATIONS}. Log-odds\nof the pass rates are normal with deviation "
        f"{args.spread:g}; "
        "their mean rises from -1.5 to 1.5. Skipped: of the prompts that the stream passed.\nA prompt that was not "
        "mixed at 3 visits or more, and now is more likely than not, waits for its next visit, in epochs\n(median, "
        f"90th percentile): auto {median_and_most[0]}; skip {median_and_most[1]}; posterior {median_and_most[2]}.",
    )


# Code reward


def run_code_reward(args):
    """Seconds of a program in its sandbox and without one, and of the reward for answers that need the CPU."""
    kinds = {
        "a script": ("print(input())", {"stdin": [["1", "1"]]}),
        "two assertions": (
            "def f(x):\n    return x",
            {"asserts": ["assert f(1) == 1"] * 2, "setup": "", "names": ["f"]},
        ),
    }
    rows = []
    for name, (program, tests) in kinds.items():
        sandboxes = {"isolated": Sandbox(), "limits only": Sandbox(isolated=False)}
        functions = {each: partial(outcomes, program, tests, sandbox) for each, sandbox in sandboxes.items()}
        times = medians(functions, dict.fromkeys(functions, args.rounds), "cpu")
        row = {"answer": name} | {f"{each}, ms": f"{1e3 * seconds:.1f}" for each, seconds in times.items()}
        row["isolation, ms"] = f"{1e3 * (times['isolated'] - times['limits only']):.1f}"
        answers = [f"```\n{program}\n# {number}\n```" for number in range(args.rounds)]
        start = time.perf_counter()
        code_reward(answers, [json.dumps(tests)] * len(answers))
        row["answers/s"] = f"{len(answers) / (time.perf_counter() - start):.0f}"
        rows.append(row)
    busy = f"import time\nwhile time.process_time() < {args.seconds}:\n    pass\nprint(1)"
    answers = [f"```\n{busy}\n# {number}\n```" for number in range(args.answers)]
    start = time.perf_counter()
    right = code_accuracy(answers, [json.dumps({"stdin": [["", "1"]]})] * args.answers)
    took, cores = time.perf_counter() - start, at_once()
    report(
        rows,
        "An answer of two assertions is two sandboxes, of the program and of its tests. Answers/s: of the reward.\n"
        f"{args.answers} answers of {args.seconds:g} s of CPU time, {sum(right):.0f} right: {took:.1f} s on {cores} "
        f"cores. So 1,024 would take {took * 1024 / args.answers:.0f} s (extrapolated); the least possible is "
        f"{args.seconds * 1024 / cores:.0f} s.",
    )


# LoRA sync


def make_base(folder: Path, sizes: dict, dtype: torch.dtype):
    """A Llama of random weights, by default as large as SmolLM2-135M, with the tiny task's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=1024, **ends)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def served(base: Path, dtype: str, args):
    """A vLLM server of the model, on the CPU, and its URL."""
    port = get_free_port()
    recipe = ["--model_name_or_path", str(base), "--use_vllm", "true", "--vllm_mode", "server"]
    recipe += ["--vllm_server_port", str(port), "--use_cpu", "true", "--bf16", "false"]
    recipe += ["--use_peft", "true", "--lora_r", str(args.rank), "--lora_target_modules", "all-linear"]
    line = vllm_server_command(read_and_validate(recipe), on_cpu=True)
    command = f"exec env {line} --dtype {dtype} --enforce-eager"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, shell=True, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


class Synced:
    """A trainer with an engine that gets its adapter in one of two ways.

    Args:
        merged: TRL's way.
        base: Folder of the model.
        dtype: Of the base, and of the engine. Adapters are float32.
        url: Of the engine's server; None for one in this process.
    """

    def __init__(self, merged: bool, base: Path, dtype: str, url: str | None, args):
        llm = vllm_generation.LLM
        vllm_generation.LLM = partial(llm, dtype=dtype, enforce_eager=True)
        try:
            self.trainer = FIPOTrainer(
                model=str(base),
                reward_funcs=mean_letter,
                args=FIPOConfig(
                    output_dir=str(base),
                    use_vllm=True,
                    vllm_mode="server" if url else "colocate",
                    vllm_server_base_url=url,
                    vllm_group_port=get_free_port(),
                    vllm_merge_lora=merged,
                    vllm_max_model_length=256,
                    vllm_gpu_memory_utilization=0.2,
                    max_completion_length=args.tokens,
                    generation_kwargs={"detokenize": False, "ignore_eos": True},  # the tokenizer knows few words
                    model_init_kwargs={"dtype": dtype},
                    report_to="none",
                    use_cpu=args.device == "cpu",
                    bf16=dtype == "bfloat16",
                    gradient_checkpointing=False,
                ),
                train_dataset=Dataset.from_dict({"prompt": ["a1b2c3="] * 64}),
                processing_class=AutoTokenizer.from_pretrained(TINY_BASE, padding_side="left"),
                peft_config=LoraConfig(
                    r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules="all-linear"
                ),
            )
        finally:
            vllm_generation.LLM = llm
        self.generation = self.trainer.vllm_generation
        if self.generation.serves_adapter is merged:
            raise RuntimeError("vLLM cannot serve this adapter, see lora_sync.py.")
        self.bytes = 0
        if url:
            self.count(self.generation.vllm_client.communicator, "broadcast")
        else:
            self.count(self.generation.llm.llm_engine.model_executor.driver_worker.model_runner.model, "load_weights")
            if not merged:
                self.count(self.generation.llm, "serve")
        named = self.trainer.model.named_parameters()
        self.base = {name: weight for name, weight in named if not weight.requires_grad}
        self.first = {name: weight.detach().clone() for name, weight in self.base.items()}

    def count(self, owner, name: str):
        """Add up the bytes of the tensors that a method gets: one, or some with their names."""
        method = getattr(owner, name)

        def counted(weights):
            tensors = [weights] if isinstance(weights, torch.Tensor) else dict(weights).values()
            self.bytes += sum(weight.nbytes for weight in tensors)
            return method(weights)

        setattr(owner, name, counted)

    @torch.no_grad()
    def move_adapter(self, size: float, seed: int):
        """Draw another one: `size` is the standard deviation of its second matrices."""
        torch.manual_seed(seed)
        for name, weight in self.trainer.model.named_parameters():
            if weight.requires_grad and "lora_B" in name:
                weight.normal_(std=size)

    def __call__(self):
        self.bytes = 0
        self.generation.sync_weights()

    @torch.no_grad()
    def sample(self, prompts: list[list[int]]) -> tuple[float, float]:
        """Seconds of sampling, and the mean |log π_engine - log π_trainer| of what was sampled, in nats."""
        start = time.perf_counter()
        _, completions, logps, _ = self.generation.generate(prompts, None, 1)
        seconds = time.perf_counter() - start
        ids = torch.tensor([prompt + ids for prompt, ids in zip(prompts, completions, strict=True)])
        logits = self.trainer.model(ids.to(self.trainer.model.device)).logits.float().cpu()
        own = logits[:, len(prompts[0]) - 1 : -1].log_softmax(dim=-1)
        own = own.gather(2, torch.tensor(completions).unsqueeze(2)).squeeze(2)
        return seconds, (own - torch.tensor(logps).squeeze(2)).abs().mean().item()

    def drift(self) -> float:
        """How far the base has moved from what it was, relative to itself."""
        moved = sum((weight - self.first[name]).float().norm() ** 2 for name, weight in self.base.items())
        return (moved / sum(first.float().norm() ** 2 for first in self.first.values())).sqrt().item()


def compare_syncs(dtype: str, args) -> dict[str, str]:
    """The adapter alone, and merged into all weights.

    Two engines of this process take turns. A server knows one trainer at a time: there one way comes after the other.
    """
    prompts = [[3 + (row + t) % 20 for t in range(8)] for row in range(args.prompts)]
    syncs, samples = {}, {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        make_base(Path(folder), args.sizes, getattr(torch, dtype))
        url = stack.enter_context(served(Path(folder), dtype, args)) if args.server else None
        for together in ([True], [False]) if url else ([True, False],):
            ways = [Synced(way, Path(folder), dtype, url, args) for way in together]
            syncs |= {way: [] for way in ways}
            samples |= {way: [] for way in ways}
            for turn in range(-1, args.rounds):  # the first brings the base, too, and is not timed
                for way in ways:
                    way.move_adapter(args.size, seed=turn + 1)
                    start = time.perf_counter()
                    way()
                    if turn >= 0:
                        syncs[way].append(time.perf_counter() - start)
                        samples[way].append(way.sample(prompts))
        merged, adapter = syncs
        adapter.move_adapter(args.size, seed=args.rounds + 1)
        _, cut = adapter.sample(prompts)
    times = {way: 1e3 * median(each) for way, each in syncs.items()}
    row = {
        "weights": dtype,
        "merged, MB": f"{merged.bytes / 1e6:.1f}",
        "adapter, MB": f"{adapter.bytes / 1e6:.1f} ({adapter.bytes / merged.bytes:.1%})",
        "merged, ms": f"{times[merged]:.0f}",
        "adapter, ms": f"{times[adapter]:.1f} (1/{times[merged] / times[adapter]:.0f})",
    }
    for name, way in (("merged", merged), ("adapter", adapter)):
        sampling, mismatches = zip(*samples[way], strict=True)
        row[f"sampling, {name}, s"] = f"{median(sampling):.2f}"
        row[f"mismatch, {name}"] = f"{mean(mismatches):.1e}"
        row[f"base moved, {name}"] = f"{way.drift():.0e}"
    return row | {"mismatch, sync cut": f"{cut:.1e}"}


def run_lora_sync(args):
    if args.server and args.device != "cpu":
        sys.exit("error: --server is for --device cpu: on a GPU the server would take the trainer's.")
    report(
        [compare_syncs(dtype, args) for dtype in args.dtypes],
        f"Syncs of {args.rounds} adapters of rank {args.rank} on all linear layers. Mismatch: mean |log π_engine - "
        f"log π_trainer| of {args.prompts} x {args.tokens}\nsampled tokens, in nats, over all of them; and once with "
        "the sync cut. Base moved: of the trainer, by merging adapters\nand taking them out, relative to its norm.",
    )


# Printing


def progress(cases):
    return tqdm(list(cases), leave=False, disable=None)


def against(times: dict[str, float], name: str, reference: str, scale: float = 1e3) -> str:
    """A table cell: the time, and its ratio to that of `reference`."""
    if name not in times:
        return "-"
    ratio = times[name] / times[reference]
    ratio = "" if name == reference else f" (x{ratio:.0f})" if ratio >= 10 else f" (x{ratio:.2f})"
    return f"{scale * times[name]:.3f}{ratio}"


def report(rows: list[dict[str, str]], note: str):
    """Print the rows as an aligned Markdown table, a note, and what the numbers were measured with."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * (width - 1) + ":" for width in widths])
    for row in table:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.machine())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"\n{note}\n\n{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}", end="; ")
    print(f"torch {torch.__version__}, trl {trl.__version__}, transformers {transformers.__version__}")
    print(f"python scripts/benchmark.py {shlex.join(sys.argv[1:])}")


# The command line


SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
SMALL = SMOLLM2_135M | {"vocab_size": 512, "num_hidden_layers": 2}
QUICK = {  # what --quick sets
    "future-kl": {"rounds": 2, "slow_rounds": 1, "shapes": ["2x300xfloat32", "2x300xbfloat16"]},
    "update": {"rounds": 1, "longest": 32, "sequences": 8, "micro_batches": [4]},
    "step": {"rounds": 1, "longest": 32, "sequences": 8, "generations": 1},
    "monitoring": {"rounds": 1, "longest": 32, "sequences": 8, "micro_batches": [4]},
    "memory": {"rounds": 2, "slow_rounds": 1, "shapes": ["2x64", "2x300"]},
    "evaluation": {"rounds": 1, "problems": 4, "batch_sizes": [8, 32]},
    "dynamic-sampling": {"rounds": 5, "prompts": 64, "rows": 500, "generations": 20},
    "code-reward": {"rounds": 3, "answers": 2, "seconds": 0.1},
    "lora-sync": {"rounds": 2, "prompts": 2, "tokens": 8, "sizes": SMALL},
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name, run, rounds, summary):
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        device = "cuda" if torch.cuda.is_available() else "cpu"
        sub.add_argument("--device", choices=["cpu", "cuda"], default=device, help="where to run")
        sub.add_argument(
            "--rounds",
            type=int,
            default=rounds,
            help="runs that a median is taken of (batches that a mean is taken of, for dynamic-sampling)",
        )
        sub.add_argument(
            "--quick", action="store_true", help="takes seconds: sets rounds and sizes, whatever is given"
        )
        sub.set_defaults(run=run)
        return sub

    kl = add("future-kl", run_future_kl, 60, "time of Future-KL, beside other ways to compute it")
    update = add("update", run_update, 3, "time of an optimizer update, with and without grouping by length")
    step = add("step", run_step, 3, "time of a whole training step, and of what it consists")
    monitoring = add("monitoring", run_monitoring, 5, "time of an optimizer update, with and without monitoring")
    memory = add("memory", run_memory, 30, "peak memory of influence_weights, and its time beside that of the model")
    evaluation = add("evaluation", run_evaluation, 3, "time of an evaluation with transformers, by its batch size")
    sampling = add("dynamic-sampling", run_dynamic_sampling, 100, "groups sampled per group trained on")
    sampling.add_argument("--prompts", type=int, default=512, help="of a generation batch")
    sampling.add_argument("--rows", type=int, default=17_000, help="prompts of the dataset, where they are remembered")
    sampling.add_argument("--generations", type=int, default=300, help="of the run in which they are remembered")
    sampling.add_argument("--spread", type=float, default=3.0, help="of pass rates: deviation of their log-odds")
    code = add("code-reward", run_code_reward, 60, "time of programs in the sandbox, and of the reward for them")
    code.add_argument("--answers", type=int, default=32, help="that need the CPU")
    code.add_argument("--seconds", type=float, default=1.0, help="of CPU time that each of them needs")

    sync = add("lora-sync", run_lora_sync, 10, "bytes and time of bringing a LoRA adapter to vLLM, and the mismatch")
    sync.add_argument("--rank", type=int, default=16, help="of the adapter")
    sync.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of base and engine")
    sync.add_argument("--size", type=float, default=5e-3, help="standard deviation of the adapter's second matrices")
    sync.add_argument("--prompts", type=int, default=16, help="that are answered after each sync")
    sync.add_argument("--tokens", type=int, default=32, help="of an answer")
    sync.add_argument("--server", action="store_true", help="a vLLM server, in place of engines in this process")
    sync.set_defaults(sizes=SMOLLM2_135M)

    shapes = "8x1024xfloat32 8x8192xfloat32 8x20480xfloat32 8x20480xfloat64 8x20480xbfloat16 1x131072xfloat32"
    kl.add_argument("--shapes", nargs="+", metavar="BxTxDTYPE", default=shapes.split(), help="inputs")
    kl.add_argument("--slow-rounds", type=int, default=3, help="runs of the block sum and of the serial scan")
    kl.add_argument("--longest-block-sum", type=int, default=20480, help="largest T that the block sum is run on")

    lengths = ["equal", "long-tailed"]
    for sub, sizes in ((update, [1, 4, 8]), (monitoring, [4]), (step, None)):
        sub.add_argument("--lengths", nargs="+", choices=lengths, default=lengths, help="distributions of lengths")
        sub.add_argument("--longest", type=int, default=256, help="longest completion, in tokens")
        sub.add_argument("--spread", type=float, default=0.65, help="of long-tailed lengths: deviation of their log")
        if sizes:
            sub.add_argument("--micro-batches", nargs="+", type=int, default=sizes, help="per_device_train_batch_size")
        sub.add_argument("--sequences", type=int, default=128, help="per update: a multiple of 4 and micro-batches")

    step.add_argument("--micro-batch", type=int, default=4, help="per_device_train_batch_size")
    step.add_argument("--generations", type=int, default=1, help="that a round trains on")

    shapes = "4x128 4x512 8x2048 1x20480 8x20480"
    memory.add_argument("--shapes", nargs="+", metavar="BxT", default=shapes.split(), help="inputs")
    memory.add_argument("--slow-rounds", type=int, default=3, help="runs of the model")
    memory.add_argument("--most-tokens", type=int, default=20480, help="largest B x T that the model is run on")

    evaluation.add_argument("--problems", type=int, default=200, help="of the held-out ones, at most")
    evaluation.add_argument("--samples", type=int, default=8, help="answers to each")
    evaluation.add_argument("--top-p", type=float, default=1.0, help="of sampling")
    evaluation.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 256, 1600], help="answers at once")

    args = parser.parse_args(argv)
    for name, value in QUICK[args.command].items() if args.quick else ():
        setattr(args, name, value)
    return args


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is experimental
    args = parse()
    args.run(args)
