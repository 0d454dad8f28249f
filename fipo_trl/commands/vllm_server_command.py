"""Print the `vllm serve` line of the server that a recipe with `vllm_mode: server` needs."""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from urllib.parse import urlsplit

import torch
from trl.scripts import vllm_serve

from fipo_trl.planning.plan import Plan
from fipo_trl.recipe.model_limits import config_of, name_of_model
from fipo_trl.recipe.read import read
from fipo_trl.recipe.validate import Recipe, validate
from fipo_trl.trainer.lora_adapter import engine_rank
from fipo_trl.trainer.vllm_server import ADAPTER_WORKER


DESCRIPTION = """Print how to start the vLLM server that a recipe with vllm_mode: server needs. No GPU is asked for.

    fipo-trl vllm-server-command --config RECIPE.yaml
    eval "exec env $(fipo-trl vllm-server-command --config RECIPE.yaml)"     # start it, on the server's node

For a recipe with use_cpu: true the server runs on this machine's CPU.
"""


def vllm_server_command(recipe: Recipe, on_cpu: bool = False) -> str:
    """The `vllm serve` line with which this TRL can sample and synchronize weights: TRL's own, for this recipe.

    Args:
        on_cpu: Whether the server runs on the CPU, with vLLM's build for it, and gets its weights over gloo.

    Raises:
        ValueError: if the recipe uses no server, or names no model; with LoRA, for a model without a config.
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
            model=name_of_model(model),
            revision=model.model_revision,
            tensor_parallel_size=training.vllm_tensor_parallel_size,
            port=url.port or 8000,
            max_model_len=training.vllm_max_model_length,
            vllm_model_impl=training.vllm_model_impl,
            trust_remote_code=training.trust_remote_code,
        )
    )
    arguments = command[command.index("serve") + 1 :]
    program = ["vllm", "serve"]
    if on_cpu:
        arguments[arguments.index("--weight-transfer-config") + 1] = json.dumps({"backend": "gloo"})
        program = [sys.executable, "-m", "fipo_trl.engines.serve_cpu"]
    variables = ["VLLM_SERVER_DEV_MODE=1"]  # with the endpoints through which TRL synchronizes weights
    if serves_adapter(recipe):
        arguments += ["--enable-lora", "--max-lora-rank", str(engine_rank(model.lora_r)), "--max-loras", "1"]
        arguments += ["--worker-extension-cls", ADAPTER_WORKER]
        variables.append("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
    return " ".join([*variables, shlex.join([*program, *arguments])])


def serves_adapter(recipe: Recipe) -> bool:
    """Whether the server gets a LoRA adapter by itself, as far as is known without vLLM."""
    model = recipe.model
    if not model.use_peft or recipe.training.vllm_merge_lora:
        return False
    return not Plan(recipe, config_of(model, recipe.training.trust_remote_code)).merged_adapter


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
        written = read(settings)
        on_cpu = "use_cpu" in written.names and validate(written).training.use_cpu
        recipe = validate(replace(written, flags=(*written.flags, *without_gpu)))
        print(vllm_server_command(recipe, on_cpu))
    except ValueError as error:
        sys.exit(f"error: {error}")
