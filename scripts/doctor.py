"""What a recipe will do and need: batches, the paper's table, memory, cost. Takes seconds, no GPU and no weights.

    python scripts/doctor.py --config recipes/Qwen2.5-32B/fipo.yaml \\
        --accelerate_config recipes/accelerate/16_nodes_fsdp2.yaml --mean_length 10000
    python scripts/doctor.py --config RECIPE.yaml --world_size 8 --gpu_memory_gib 40 --max_completion_length 4096

Flags of `scripts/train_fipo.py` may follow, and win over the recipe. The exit status is 1 if the run cannot work.
"""

import argparse
import sys
from unittest.mock import patch

import torch
from train_fipo import load_rewards, parse
from transformers import TrainingArguments

from fipo_trl import doctor
from fipo_trl.reasoning_gym_problems import check_task, is_task


def examine(arguments: list[str], world_size: int, **spread) -> doctor.Run:
    """Parse a recipe as `world_size` processes would, on a machine that may have no GPU.

    Raises:
        ValueError: for what the parser and the configuration refuse, for rewards that cannot be loaded, for a task of
            reasoning-gym or its settings that there are not, and for a model without a config.
    """
    without_gpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    with patch.object(TrainingArguments, "world_size", world_size):
        script_args, args, model_args, _ = parse([*arguments, *without_gpu])
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: give a local folder or the id of a model on the Hub.")
    load_rewards(script_args, args)
    if is_task(script_args.dataset_name or ""):
        check_task(script_args.dataset_name, script_args.dataset_settings)
    config = doctor.public_config(model_args.model_name_or_path)
    config = config or doctor.find_config(model_args, args.trust_remote_code)
    return doctor.Run(script_args, args, model_args, config, world_size=world_size, **spread)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--accelerate_config", metavar="YAML", help="how the run is spread: see recipes/accelerate")
    parser.add_argument("--world_size", type=int, help="number of processes; default: the accelerate config's, or 1")
    parser.add_argument("--gpu_memory_gib", type=float, default=80.0, help="memory of each GPU (default: 80)")
    parser.add_argument("--mean_length", type=float, help="mean tokens per completion (default: 4000)")
    parser.add_argument("--tokens_per_second", type=float, help="completion tokens per second of all GPUs, measured")
    parser.add_argument("--paper", choices=["32B", "7B"], help="model of the paper to compare with (default: by name)")
    options, arguments = parser.parse_known_args()
    try:
        for name in ("world_size", "gpu_memory_gib", "mean_length", "tokens_per_second"):
            value = getattr(options, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value} must be greater than 0.")
        spread = doctor.read_accelerate_config(options.accelerate_config) if options.accelerate_config else {}
        run = examine(arguments, **spread | {"world_size": options.world_size or spread.get("world_size", 1)})
        gpu = options.gpu_memory_gib * doctor.GIB
        size = options.paper or ("7B" if "math-7b" in run.model_args.model_name_or_path.lower() else "32B")
        print(doctor.report(run, gpu, size, options.mean_length, options.tokens_per_second))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    reasons = doctor.impossible(run.script_args, run.args, run.model_args, run.config, run.world_size)
    reasons += doctor.memory_problems(run, gpu)
    for reason in reasons:
        print(f"\nCannot work: {reason}")
    sys.exit(1 if reasons else 0)


if __name__ == "__main__":
    main()
