"""Rollouts and weight sync with a `vllm serve` of its own, over gloo: vLLM's server, TRL's client, no GPU."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import torch
from cpu_ranks import FSDP2, Ranks, free_port
from held import PATIENCE, REWARD, HeldRun
from sync_on_ranks import check, kill
from tiny import BASE

from fipo_trl.trainer.lora_adapter import Room
from fipo_trl.trainer.vllm_server import ADAPTER_WORKER, ServerClient


if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("vLLM runs on the GPU", allow_module_level=True)

ROOT = Path(__file__).parents[2]
FIPO_TRL = [sys.executable, "-m", "fipo_trl"]
RECIPE = ["--config", "recipes/tiny/fipo_vllm.yaml", "--vllm_mode", "server", "--vllm_server_host", "127.0.0.1"]
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class Server:
    """The server that the command prints, with weights in float32: only wrong weights make it differ from a trainer.

    Args:
        folder: For what it prints.
        port: At which it listens.
        settings: Of the recipe, besides.
    """

    def __init__(self, folder: Path, port: int, *settings: str):
        printed = subprocess.check_output(
            [*FIPO_TRL, "vllm-server-command", *RECIPE, "--vllm_server_port", str(port), *settings],
            text=True,
            cwd=ROOT,
        )
        line = f"exec env {printed.strip()} --dtype float32 --enforce-eager --block-size 32"
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.url, self.log = f"http://127.0.0.1:{port}", folder / f"server_log_{time.monotonic_ns()}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                line, shell=True, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | variables
            )

    def wait(self):
        """Until it answers."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{self.url}/health", timeout=PATIENCE).status_code == 200:
                    return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def kill(self):
        kill(self.process.pid)
        self.process.wait()


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory, port):
    server = Server(tmp_path_factory.mktemp("server"), port)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def for_adapters(tmp_path_factory):
    """A server that is started for adapters, of which all runs make use, one after the other."""
    adapter = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear"]
    server = Server(tmp_path_factory.mktemp("server"), free_port(), *adapter)
    server.wait()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, server):
    """Imports while the server starts."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    server.wait()
    yield ranks
    ranks.close()


def at(server: Server) -> dict:
    """Settings with which a run talks to it."""
    return {"vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_group_port": free_port()}


@pytest.mark.parametrize("launch", [(), FSDP2], ids=["one process", "FSDP2"])
def test_trained_weights_reach_the_server(tmp_path, ranks, server, launch):
    processes = 2 if launch else 1
    returned = ranks.run("sync_on_ranks:train", tmp_path, BASE, False, at(server), processes=processes, launch=launch)
    if launch:
        assert all(rank["held"]["DTensor"] for rank in returned)
    check(returned[0])


def test_a_server_that_was_not_started_for_adapters_gets_merged_weights(tmp_path, ranks, server):
    (seen,) = ranks.run("sync_on_ranks:train", tmp_path, BASE, True, at(server), processes=1)
    assert not seen["serves_adapter"]
    check(seen)
    assert "the vLLM server was started without room for adapters. Start it with the line" in ranks.printed()


@pytest.mark.parametrize("launch", [(), FSDP2], ids=["one process", "FSDP2"])
def test_adapters_reach_the_server(tmp_path, ranks, for_adapters, launch):
    settings, processes = at(for_adapters), 2 if launch else 1
    returned = ranks.run("sync_on_ranks:train", tmp_path, BASE, True, settings, processes=processes, launch=launch)
    if launch:
        assert all(rank["held"]["DTensor"] for rank in returned)
    assert all(rank["serves_adapter"] for rank in returned)
    check(returned[0])


def test_the_server_answers_with_the_base_and_the_adapter_of_the_trainer_and_with_no_older_one(
    tmp_path, ranks, for_adapters
):
    (seen,) = ranks.run("sync_on_ranks:answers", tmp_path, BASE, at(for_adapters), processes=1)
    assert seen["server"] == seen["trainer"]
    assert len(set(map(str, seen["trainer"]))) == 4  # they answer differently
    assert [len(known) for known in seen["known"]] == [2] * 4  # the base and one adapter, after earlier runs, too


@pytest.mark.parametrize(("merged", "rank"), [(True, 4), (False, 9)], ids=["by the setting", "of too large a rank"])
def test_a_server_for_adapters_takes_merged_weights(tmp_path, ranks, for_adapters, merged, rank):
    (seen,) = ranks.run("sync_on_ranks:train", tmp_path, BASE, True, at(for_adapters), merged, rank, processes=1)
    assert not seen["serves_adapter"]
    check(seen)
    assert merged or "started for adapters of rank 8 at most, and this one has 9. Start it" in ranks.printed()


def test_a_server_that_dies_takes_no_adapter_and_all_processes_learn_it(tmp_path, ranks, for_adapters):
    """The last test of this server."""
    settings, pid = at(for_adapters), for_adapters.process.pid
    for error in ranks.run("sync_on_ranks:bereaved", tmp_path, BASE, settings, pid, launch=FSDP2):
        assert f"The vLLM server at {for_adapters.url} does not answer" in error


def test_a_server_that_dies_ends_the_run_with_a_checkpoint_and_a_new_one_lets_it_go_on(tmp_path, server, ranks, port):
    settings = ["--accelerate_config", "two_cpu_processes", "--main_process_port", "0", *RECIPE, *REWARD]
    settings += ["--per_device_train_batch_size", "8", "--max_steps", "24", "--vllm_server_port", str(port)]
    settings += ["--vllm_group_port", str(free_port()), "--output_dir", str(tmp_path / "out")]
    command = [*FIPO_TRL, "train", *settings]
    with HeldRun(command, tmp_path / "held", generation=2, processes=2) as run:
        server.kill()
        assert run.let_go() == 1
        log = run.log.read_text()
    checkpoint = tmp_path / "out" / "checkpoint-16"
    assert f"ConnectionError: The vLLM server at {server.url} does not answer" in log
    assert f"after update 16. The checkpoint of that update is {checkpoint}" in log
    again = Server(tmp_path, port)  # the run waits for it
    try:
        ended = subprocess.run(
            [*command, "--resume_from_checkpoint", "latest"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
    finally:
        again.kill()
    assert ended.returncode == 0, ended.stdout
    assert "Trained for 24 updates." in ended.stdout


def test_a_server_that_waits_for_nccl_is_refused(monkeypatch):
    client = object.__new__(ServerClient)  # without a server
    client.base_url = "http://node3:8000"
    monkeypatch.setattr(client, "get_server_info", lambda: {"weight_transfer_config": {"backend": "nccl"}})
    with pytest.raises(ValueError, match=r"at http://node3:8000 cannot take.* is nccl, not gloo.*vllm-server-command"):
        client.init_communicator(torch.device("cpu"))


@pytest.mark.parametrize(
    "missing",
    [{}, {"worker_extension_cls": ""}, {"data_parallel_size": 2}, {"lora_config": None}, {"updating": False}],
    ids=lambda missing: ", ".join(missing),
)
def test_every_option_of_a_server_for_adapters_is_needed(monkeypatch, missing):
    """What the server for adapters above says is read; here one thing of it is not so."""
    answered = {"worker_extension_cls": ADAPTER_WORKER, "data_parallel_size": 1, "updating": True}
    answered |= {"lora_config": {"max_lora_rank": 16, "lora_dtype": "torch.float32"}} | missing
    info = {
        "vllm_config": {"parallel_config": answered, "lora_config": answered["lora_config"]},
        "vllm_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": answered["updating"]},
    }
    client = object.__new__(ServerClient)  # without a server
    client.base_url = "http://node3:8000"
    monkeypatch.setattr(client, "_get", lambda url, params: info)
    monkeypatch.setattr(client, "_post", lambda url, json: {"results": [["layer"]]})
    assert client.room() == Room(*((0, torch.float32, set()) if missing else (16, torch.float32, {"layer"})))
