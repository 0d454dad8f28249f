"""What a recipe will do and need, printed; no GPU and no weights."""

import argparse
import sys
from typing import Literal

from fipo_trl.planning.doctor import examine
from fipo_trl.planning.memory import GIB
from fipo_trl.planning.plan import make_plan, read_accelerate_config
from fipo_trl.recipe.model_limits import impossible
from fipo_trl.recipe.shipped import find_accelerate_config


DESCRIPTION = """\
What a recipe will do and need: batches, the paper's table, memory, cost. Takes seconds, no GPU and no weights.

    fipo-trl doctor --config recipes/Qwen2.5-32B/fipo.yaml --accelerate_config 16_nodes_fsdp2 --mean_length 10000
    fipo-trl doctor --config RECIPE.yaml --world_size 8 --gpu_memory_gib 40 --max_completion_length 4096

The verdict comes first. Memory is an estimate, which informs and does not decide: the exit status is 1 if the run
cannot work by its settings. Flags of `fipo-trl train` may follow, and win over the recipe.
"""


def main(arguments: list[str]):
    """Print what is known about a recipe, and end with 1 if it cannot work."""
    parser = argparse.ArgumentParser(
        prog="fipo-trl doctor",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--accelerate_config", metavar="YAML", help="how the run is spread: a file, or a name in recipes/accelerate"
    )
    parser.add_argument("--world_size", type=int, help="number of processes; default: the accelerate config's, or 1")
    parser.add_argument("--gpu_memory_gib", type=float, default=80.0, help="memory of each GPU (default: 80)")
    parser.add_argument("--mean_length", type=float, help="mean tokens per completion (default: 4000)")
    parser.add_argument("--tokens_per_second", type=float, help="completion tokens per second of all GPUs, measured")
    parser.add_argument("--paper", choices=["32B", "7B"], help="model of the paper to compare with (default: by name)")
    options, settings = parser.parse_known_args(arguments)
    try:
        for name in ("world_size", "gpu_memory_gib", "mean_length", "tokens_per_second"):
            value = getattr(options, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value} must be greater than 0.")
        config = options.accelerate_config
        spread = read_accelerate_config(str(find_accelerate_config(config))) if config else {}
        plan = make_plan(settings, **spread | {"world_size": options.world_size or spread.get("world_size", 1)})
        gpu = options.gpu_memory_gib * GIB
        by_name: Literal["32B", "7B"] = "7B" if "math-7b" in plan.model.model_name_or_path.lower() else "32B"
        print(examine(plan, gpu, options.paper or by_name, options.mean_length, options.tokens_per_second))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if impossible(plan.recipe, plan.config, plan.world_size) else 0)
