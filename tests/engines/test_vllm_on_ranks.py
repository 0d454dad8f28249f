"""vLLM colocated with two ranks: the weights that FSDP2 and ZeRO-3 shard reach an engine per rank, and one of both."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_ranks import FSDP2, ON_CPU, ZERO3, Ranks
from four_heads import save_four_heads
from sync_on_ranks import check


if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("vLLM runs on the GPU", allow_module_level=True)

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_heads")
    save_four_heads(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    os.environ["VLLM_CPU_KVCACHE_SPACE"], os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "1", "nobind"
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("launch", "tensor_parallel", "lora"),
    [(FSDP2, 2, False), (FSDP2, 1, True), (ZERO3, 2, True), (ZERO3, 1, False)],
    ids=["FSDP2-TP2-full", "FSDP2-TP1-LoRA", "ZeRO3-TP2-LoRA", "ZeRO3-TP1-full"],
)
def test_sharded_weights_reach_the_engine(tmp_path, ranks, model, launch, tensor_parallel, lora):
    settings = {"vllm_mode": "colocate", "vllm_tensor_parallel_size": tensor_parallel, "vllm_max_model_length": 64}
    returned = ranks.run("sync_on_ranks:train", tmp_path, model, lora, settings, launch=launch)
    engine = "FSDP" if launch is FSDP2 else "DEEPSPEED"
    for seen in returned:
        assert engine in seen["held"]["engine"]
        assert seen["held"]["weights"] < 0.9  # a share of them
        assert seen["tensor_parallel"] == tensor_parallel
        assert seen["serves_adapter"] is lora
    check(returned[0])


def test_an_adapter_is_less_than_the_model(tmp_path, ranks, model):
    """`pytest -s` prints bytes and seconds of the syncs of rank 0, the first of which brings the base, too."""
    settings = {"vllm_mode": "colocate", "vllm_max_model_length": 64}
    seen = {}
    for way in ("merged", "adapter"):
        arguments = (tmp_path, model, True, settings, way == "merged", 2)
        first, second = ranks.run("sync_on_ranks:train", *arguments, launch=FSDP2)
        check(first)
        seen[way] = [(moved, round(seconds, 3)) for moved, seconds in first["syncs"]]
        assert [moved for moved, _ in first["syncs"]] == [moved for moved, _ in second["syncs"]]
    print(seen)
    (base, _), *later = seen["adapter"]
    assert len(later) == 2
    for (merged, _), (adapter, _) in zip(seen["merged"][1:], later, strict=True):
        assert adapter < 0.05 * merged
        assert base == merged + adapter


def test_the_command_ends_with_0(tmp_path, model):
    """TP 2 with FSDP2. The engine shares the process group, which must not end before it."""
    script = ["tests/cpu_ranks.py", "scripts/train_fipo.py", "--config", "recipes/tiny/fipo_vllm.yaml"]
    settings = ["--model_name_or_path", str(model), "--vllm_tensor_parallel_size", "2", "--max_steps", "16"]
    settings += ["--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "out")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *FSDP2, "--num_processes", "2"]
    ended = subprocess.run(
        [*launch, "--main_process_port", "0", *script, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | ON_CPU | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    assert ended.returncode == 0, ended.stdout
    assert "Trained for 16 updates." in ended.stdout
