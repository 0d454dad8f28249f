"""Print the `vllm serve` line of the server that a recipe with `vllm_mode: server` needs."""

import argparse
import shlex
import sys
from urllib.parse import urlsplit

import torch
from trl.scripts import vllm_serve

from fipo_trl.recipe.validate import Recipe, read_and_validate


DESCRIPTION = """Print how to start the vLLM server that a recipe with vllm_mode: server needs. No GPU is asked for.

    fipo-trl vllm-server-command --config RECIPE.yaml
    eval "exec env $(fipo-trl vllm-server-command --config RECIPE.yaml)"     # start it, on the server's node
"""


def vllm_server_command(recipe: Recipe) -> str:
    """The `vllm serve` line with which this TRL can sample and synchronize weights: TRL's own, for this recipe.

    Raises:
        ValueError: if the recipe uses no server.
    """
    training, model = recipe.training, recipe.model
    if not training.use_vllm or training.vllm_mode != "server":
        raise ValueError(
            f"use_vllm={training.use_vllm}, vllm_mode='{training.vllm_mode}' needs no vLLM server. Set "
            "use_vllm: true and vllm_mode: server."
        )
    url = urlsplit(training.vllm_server_base_url or f"http://:{training.vllm_server_port}")
    command = vllm_serve.build_command(
        vllm_serve.ScriptArguments(
            model=model.model_name_or_path,
            revision=model.model_revision,
            tensor_parallel_size=training.vllm_tensor_parallel_size,
            port=url.port or 8000,
            max_model_len=training.vllm_max_model_length,
            vllm_model_impl=training.vllm_model_impl,
            trust_remote_code=training.trust_remote_code,
        )
    )
    # Dev mode has the endpoints through which TRL synchronizes weights
    return "VLLM_SERVER_DEV_MODE=1 " + shlex.join(["vllm", *command[command.index("serve") :]])


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(
        prog="fipo-trl vllm-server-command",
        usage="fipo-trl vllm-server-command --config RECIPE.yaml [--SETTING VALUE ...]",
        description=DESCRIPTION,
        epilog="The settings are those of `fipo-trl train`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _, settings = parser.parse_known_args(arguments)
    without_gpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]  # a login node
    try:
        print(vllm_server_command(read_and_validate([*settings, *without_gpu])))
    except ValueError as error:
        sys.exit(f"error: {error}")
