"""`fipo-trl vllm-server-command` on a login node: without a GPU, and without vLLM. See also engines/test_vllm.py."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
from conftest import ROOT


RECIPE = "recipes/Qwen2.5-32B/fipo.yaml"
COMMAND = [sys.executable, "-m", "fipo_trl", "vllm-server-command"]
WITHOUT_VLLM = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.split(".")[0] == "vllm" else find(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture
def login_node(tmp_path):
    """The environment of a machine that has neither a GPU nor vLLM."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(WITHOUT_VLLM)  # Python imports it when it starts
    path = os.pathsep.join([str(tmp_path / "hidden"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    code = (
        "import importlib.util, torch; assert not importlib.util.find_spec('vllm') and not torch.cuda.is_available()"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return environment


def run(environment, *arguments):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_the_line_that_a_shell_runs(tmp_path, login_node):
    """As recipes/slurm/server.sbatch starts the server, with a stand-in for vLLM that says what it was called with."""
    vllm = tmp_path / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text('#!/bin/bash\nprintf \'%s\\n\' "$VLLM_SERVER_DEV_MODE" "$@"\n')
    vllm.chmod(0o755)
    environment = login_node | {"PATH": f"{vllm.parent}:{os.environ['PATH']}"}
    script = f'eval "exec env $({sys.executable} -m fipo_trl vllm-server-command --config "$@")"'
    arguments = [RECIPE, "--vllm_mode", "server", "--vllm_server_base_url", "http://node3:8123", "--output_dir", "a b"]
    shell = ["bash", "-euc", script, "bash", *arguments]
    ended = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    dev_mode, serve, model, *settings = ended.stdout.splitlines()
    assert (dev_mode, serve, model) == ("1", "serve", "Qwen/Qwen2.5-32B")
    values = dict(pairwise(settings))
    assert values["--port"] == "8123"
    assert values["--max-model-len"] == "22528"
    assert values["--weight-transfer-config"] == '{"backend": "nccl"}'
    assert values["--logprobs-mode"] == "processed_logprobs"
    assert "Traceback" not in ended.stderr


def test_help(login_node):
    ended = run(login_node, "--help")
    assert ended.returncode == 0, ended.stderr
    assert "fipo-trl vllm-server-command --config RECIPE.yaml" in ended.stdout


@pytest.mark.slow
def test_a_server_for_adapters(login_node):
    """Without the room for one where the adapter is merged. See engines/test_vllm_server.py for what it then does."""
    lora = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_r", "20"]
    command = ["--config", RECIPE, "--vllm_mode", "server", *lora]
    ended = run(login_node, *command)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve Qwen/")
    options = "--enable-lora --max-lora-rank 32 --max-loras 1"
    worker = "--worker-extension-cls fipo_trl.engines.adapter_worker.AdapterWorker"
    assert ended.stdout.endswith(f" {options} {worker}\n")
    for merged in ("--vllm_merge_lora", "--use_dora"):
        ended = run(login_node, *command, merged, "true")
        assert ended.stdout.startswith("VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/")
        assert "lora" not in ended.stdout.lower()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["--use_peft", "true"]], ids=["full", "lora"])
def test_a_model_is_needed(login_node, lora):
    ended = run(login_node, "--use_vllm", "true", "--vllm_mode", "server", *lora)
    assert ended.returncode == 1
    assert ended.stderr.endswith(
        "error: model_name_or_path is not set: give a local folder or the id of a model on the Hub.\n"
    )


@pytest.mark.slow
def test_a_recipe_that_needs_no_server(login_node):
    ended = run(login_node, "--config", RECIPE)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1].startswith("error: use_vllm=True, vllm_mode='colocate' needs no vLLM server.")
    assert "Traceback" not in ended.stderr
