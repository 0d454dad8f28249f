"""What runs, how fast and in how much memory, on a machine with one NVIDIA GPU: one report, in 10 minutes, no network.

    make gpu-check
    python scripts/gpu_check.py --output_dir outputs/gpu-check
    python scripts/gpu_check.py --device cpu    # the parts that need no GPU, at small sizes

Each part runs in a process of its own. One that fails is in the report as failed, with its error, and makes the exit
status 1. One that cannot run here is in the report as not run. Models have random weights. It needs a clone, torch,
transformers, accelerate, TRL, PEFT and datasets; vLLM where that is to be checked.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
import yaml
from benchmark import UPDATES_PER_GENERATION, Cycle, medians
from transformers import AutoModelForCausalLM

from fipo_trl.objective.influence import influence_weights
from fipo_trl.planning.memory import GIB, rollout_memory, update_memory
from fipo_trl.planning.plan import make_plan
from fipo_trl.recipe.model_limits import public_config


ROOT = Path(__file__).parents[1]
MODEL = "Qwen2.5-0.5B"  # its shape, on a GPU
LONGEST = {"cuda": 16384, "cpu": 64}  # tokens of a completion
SECONDS = 600  # of all parts together
BOUND = 0.05  # nats per token, of the mean mismatch between a bfloat16 engine and a bfloat16 trainer


class NotRun(Exception):
    """A part that cannot run on this machine."""


# The parts: each returns what it measured, or raises


def golden(device: str) -> dict:
    """The official loss on its 10 batches. Largest error, relative to the largest value."""
    sys.path.append(str(ROOT / "tests"))
    import reference

    data = np.load(ROOT / "tests" / "golden" / "official_loss.npz")
    errors = {"float32": 0.0, "bfloat16": 0.0}
    for number, case in enumerate(json.loads(bytes(data["meta"]))):
        official = {
            key[3:]: torch.from_numpy(data[key]).to(device) for key in data.files if key[:2] == f"{number:02d}"
        }
        width = case["clip_range"]
        bounds = (1.0 if case["clip_high_only"] else 1.0 - width, 1.0 + width) if width else (0.0, 10.0)
        for dtype in errors:
            logps, old, advantages = (
                official[name].to(getattr(torch, dtype))
                for name in ("per_token_logps", "old_per_token_logps", "advantages")
            )
            mask, log_ratio = official["mask"], logps - old
            result = influence_weights(
                log_ratio,
                advantages,
                mask,
                half_life=case["half_life"],
                weight_min=bounds[0],
                weight_max=bounds[1],
                dual_clip=case["dual_clip"],
                safety_ratio=case["safety_threshold"],
            )
            kept = mask * result.kept.unsqueeze(1)
            weighted = result.weights * advantages.unsqueeze(1)
            clips = case["epsilon_low"], case["epsilon_high"], case["dual_clip"]
            losses = reference.token_losses(log_ratio, weighted, *clips)
            loss = (losses * kept).sum() / (kept.sum() + 1e-8)
            error = abs(loss.item() - official["loss"].item()) / max(1.0, abs(official["loss"].item()))
            errors[dtype] = max(errors[dtype], error)
    if errors["float32"] > 1e-5:
        raise AssertionError(f"float32 differs from the official loss by {errors['float32']:.1e}, more than 1e-5")
    return {f"largest error of the loss, {dtype}": error for dtype, error in errors.items()}


def make_model(device: str) -> Any:
    """Random weights: of `MODEL`'s shape in bfloat16 on a GPU, else the benchmark's."""
    if device == "cpu":
        return None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(public_config(MODEL), dtype=torch.bfloat16)


def cycle_of(name: str, device: str, folder: str) -> Cycle:
    """A trainer whose updates hold 16 long-tailed completions, in micro-batches of one."""
    sizes = argparse.Namespace(device=device, longest=LONGEST[device], spread=0.65, sequences=16)
    settings = {"bf16": True, "gradient_checkpointing": True} if device == "cuda" else {}
    return Cycle(name, "long-tailed", 1, sizes, folder, model=make_model(device), **settings)


def update_speed(device: str) -> dict:
    """Seconds per update of 16 long-tailed completions, with the pass for old log-probs; they take turns."""
    with tempfile.TemporaryDirectory() as folder:
        cycles = {name: cycle_of(name, device, folder) for name in ("FIPOTrainer", "GRPOTrainer")}
    times = medians(cycles, dict.fromkeys(cycles, 2), device)
    seconds = {name: value / UPDATES_PER_GENERATION for name, value in times.items()}
    measured: dict[str, Any] = {f"{name}, s": value for name, value in seconds.items()}
    measured["GRPOTrainer over FIPOTrainer"] = seconds["GRPOTrainer"] / seconds["FIPOTrainer"]
    return measured | {"longest completion, tokens": LONGEST[device]}


def share_of_fipo(device: str) -> dict:
    """What the weights take of an update of one longest completion: beside a forward and a backward pass."""
    model, tokens = make_model(device), LONGEST[device]
    if model is None:
        from benchmark import make_model as make_small

        model = make_small()
    model.to(device).gradient_checkpointing_enable()
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
    log_ratio, mask = 0.1 * torch.randn(1, tokens, device=device), torch.ones_like(ids)
    functions = {
        "influence_weights": partial(influence_weights, log_ratio, torch.ones(1, device=device), mask),
        "forward and backward": lambda: model(ids, labels=ids).loss.backward(),
    }
    times = medians(functions, dict.fromkeys(functions, 5), device)
    measured: dict[str, Any] = {f"{name}, ms": 1e3 * value for name, value in times.items()}
    return measured | {"share": times["influence_weights"] / times["forward and backward"]}


def memory(device: str) -> dict:
    """GiB that an update and a rollout hold at their peaks, against the doctor's estimate."""
    need_gpu(device)
    total = torch.cuda.get_device_properties(0).total_memory
    with tempfile.TemporaryDirectory() as folder:
        cycle = cycle_of("FIPOTrainer", device, folder)
    args = cycle.trainer.args
    settings = {
        "model_name_or_path": MODEL,
        "reward_funcs": "think_format_reward",
        "dtype": "bfloat16",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "steps_per_generation": args.steps_per_generation,
        "num_generations": args.num_generations,
        "max_completion_length": args.max_completion_length,
        "gradient_checkpointing": "true",
        "bf16": "true",
    }
    plan = make_plan([word for name, value in settings.items() for word in (f"--{name}", str(value))], world_size=1)
    trainer, held = cycle.trainer, torch.cuda.memory_allocated
    measured = {"weights": held()}
    cycle()  # the optimizer's states come to be
    states = held()
    torch.cuda.reset_peak_memory_stats()
    cycle()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    free, whole = torch.cuda.mem_get_info()
    of_optimizer = sum(
        value.numel() * value.element_size()
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    gradients = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    measured |= {"gradients": gradients, "optimizer states": of_optimizer}
    measured["all else, at the peak"] = peak - measured["weights"] - gradients - of_optimizer
    measured["other"] = whole - free - torch.cuda.memory_reserved() + reserved - peak
    estimate = {part.name: part.size for part in update_memory(plan, total)}
    named = ("weights", "gradients", "optimizer states", "other")
    estimate["all else, at the peak"] = sum(size for name, size in estimate.items() if name not in named)
    result = {f"update: {name}": against(size, estimate[name]) for name, size in measured.items()}
    result["update: in all"] = against(sum(measured.values()), sum(part.size for part in update_memory(plan, total)))

    # A rollout of transformers: 16 rows to a quarter of the length, without an end
    trainer.optimizer.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rows, tokens = 16, args.max_completion_length // 16
    prompts = torch.full((rows, 8), 5, device=device)
    trainer.model.eval().generate(prompts, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=True)
    parts = {part.name: part.size for part in rollout_memory(plan, total)}
    scale = rows * tokens / (args.generation_batch_size * plan.longest)
    cache = parts["keys and values"] * scale + parts["scores of the next word"] * rows / args.generation_batch_size
    result[f"rollout of {rows} x {tokens} tokens, beyond weights and optimizer"] = against(
        torch.cuda.max_memory_allocated() - measured["weights"] - of_optimizer, cache
    )
    result["held between updates"] = f"{states / GIB:.2f} GiB"
    return result


def against(measured: float, estimate: float) -> str:
    return f"{measured / GIB:.2f} GiB measured, {estimate / GIB:.2f} estimated"


def nccl(device: str) -> dict:
    """A training of one rank whose gradients go through NCCL."""
    need_gpu(device)
    port = "29531"
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return train("recipes/tiny/fipo.yaml", ["--max_steps", "16", "--logging_steps", "8"], environment)


def colocated(device: str) -> dict:
    """vLLM in the same process and on the same GPU, which sleeps during updates."""
    if importlib.util.find_spec("vllm") is None:
        raise NotRun("vLLM is not installed")
    need_gpu(device)
    settings = ["--vllm_enable_sleep_mode", "true", "--vllm_gpu_memory_utilization", "0.3"]
    measured = train("recipes/tiny/fipo_vllm.yaml", [*settings, "--max_steps", "40", "--learning_rate", "2e-3"])
    if not measured["engine_mismatch/mean"] or max(measured["engine_mismatch/mean"]) > BOUND:
        raise AssertionError(f"the engine is not the policy: engine_mismatch/mean={measured['engine_mismatch/mean']}")
    return measured


def train(recipe: str, settings: list[str], environment: dict[str, str] | None = None) -> dict:
    """Train a tiny recipe on the GPU in bfloat16, by the command. Its time, and how far an engine was from it."""
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = ["--use_cpu", "false", "--bf16", "true", "--save_strategy", "no", "--output_dir", folder]
        command = [sys.executable, "-m", "fipo_trl.commands.train", "--config", recipe, *on_gpu, *settings]
        began = time.perf_counter()
        run(command, environment)
        log = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    mismatch = [row["engine_mismatch/mean"] for row in log if "engine_mismatch/mean" in row]
    return {"seconds": time.perf_counter() - began, "engine_mismatch/mean": mismatch}


def quickstart(device: str) -> dict:
    """The quickstart, in bfloat16 on a GPU. On the CPU it is `make quickstart`."""
    need_gpu(device)
    with tempfile.TemporaryDirectory() as folder:
        recipe = yaml.safe_load((ROOT / "recipes/tiny/fipo.yaml").read_text()) | {"use_cpu": False, "bf16": True}
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(recipe))
        run([sys.executable, "scripts/quickstart.py", "--config", str(path), "--output_dir", folder])
        return json.loads(Path(folder, "summary.json").read_text())


def run(command: list[str], environment: dict[str, str] | None = None):
    """Run a command of the clone. Raises with the end of what it printed."""
    ended = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | (environment or {}),
    )
    if ended.returncode != 0:
        raise RuntimeError(f"exit status {ended.returncode}: {ended.stdout[-2000:]}")


def need_gpu(device: str):
    if device != "cuda":
        raise NotRun("it needs a GPU")


PARTS = {part.__name__: part for part in (golden, share_of_fipo, update_speed, memory, nccl, colocated, quickstart)}


# The report


def run_part(name: str, device: str, seconds: float) -> dict:
    """Run a part in a process of its own: what it measured, and what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, __file__, "--device", device, "--part", name, "--result", str(result)]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            printed, _ = process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            printed = f"it took more than the {seconds:.0f} s that were left of {SECONDS}"
        took = time.perf_counter() - began
        if result.exists():
            return json.loads(result.read_text()) | {"seconds": took}
    return {"status": "failed", "error": printed[-2000:], "seconds": took}


def part_result(name: str, device: str) -> dict:
    """In the process of a part."""
    try:
        return {"status": "ok", "measured": PARTS[name](device)}
    except NotRun as reason:
        return {"status": "not run", "error": str(reason)}
    except Exception as error:
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def write_report(results: dict[str, dict], device: str, folder: Path):
    """report.json, and the same as Markdown."""
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"machine": machine, "parts": results}, indent=2))
    lines = ["# GPU check", "", ", ".join(f"{name}: {value}" for name, value in machine.items()), ""]
    lines += ["| part | status | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {part['status']} | {part['seconds']:.0f} |" for name, part in results.items()]
    for name, part in results.items():
        purpose = (PARTS[name].__doc__ or "").strip()
        lines += ["", f"## {name}", "", purpose, ""]
        lines += ["```", part["error"].strip(), "```"] if "error" in part else ["| measured | value |", "|---|---|"]
        for what, value in part.get("measured", {}).items():
            lines.append(f"| {what} | {f'{value:.4g}' if isinstance(value, float) else value} |")
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    parser.add_argument("--output_dir", type=Path, default="outputs/gpu-check", help="default: outputs/gpu-check")
    parser.add_argument("--part", choices=PARTS, help="one part only, in this process")
    parser.add_argument("--result", type=Path, help="where a part writes what it measured")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no NVIDIA GPU. `python scripts/gpu_check.py --device cpu` runs what needs none.")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}  # rollout_func is experimental
    if options.part:
        result = part_result(options.part, options.device)
        text = json.dumps(result)
        options.result.write_text(text) if options.result else print(text)
        return
    results, began = {}, time.perf_counter()
    for name in PARTS:
        results[name] = run_part(name, options.device, SECONDS - (time.perf_counter() - began))
        print(f"{name}: {results[name]['status']}, {results[name]['seconds']:.0f} s", flush=True)
        write_report(results, options.device, options.output_dir)
    print(f"The report is in {options.output_dir}/report.md.")
    sys.exit(any(part["status"] == "failed" for part in results.values()))


if __name__ == "__main__":
    main()
