"""The trainer's side of a vLLM server (`vllm_mode="server"`): TRL's client, with two things that it lacks.

* Where the trainer is on the CPU, weights go over gloo. TRL's client knows NCCL only.
* Where the server is gone, or fails, the run fails in all of its processes at the same place, so that a checkpoint of
  its last update is saved (`last_update.py`), and says which server it was. Only the main process talks to the server:
  if it failed alone, the others would wait for it.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from fipo_trl.engines.gloo_group import GlooGroup
from fipo_trl.trainer.trl_contract import check_client


@contextmanager
def server_client() -> Iterator[None]:
    """While a trainer is built: what TRL makes to talk to its server is a [`ServerClient`]."""
    vllm_generation.VLLMClient = ServerClient
    try:
        yield
    finally:
        vllm_generation.VLLMClient = VLLMClient


class NoAnswer(list):
    """In place of completions, which the main process sends to all: it raises where they are read.

    Args:
        reason: What became of the server.
    """

    def __init__(self, reason: str):
        self.reason = reason

    def __reduce__(self):
        return NoAnswer, (self.reason,)

    def __iter__(self) -> NoReturn:
        raise ConnectionError(self.reason)


class ServerClient(VLLMClient):
    """TRL's client, as said above. After a failure it asks the server for nothing more.

    Raises:
        ConnectionError: where completions are read, for all that failed in making them or in sending weights before.
    """

    def __init__(self, *args, **kwargs):
        check_client(VLLMClient)
        self._failure: NoAnswer | None = None
        super().__init__(*args, **kwargs)
        for adapter in self.session.adapters.values():
            # Once, at once, for a connection that was left idle. TRL asks for a minute: a server that was started anew
            # in the meantime would answer, and has the weights of the base
            adapter.max_retries = adapter.max_retries.new(connect=1, read=1)

    def init_communicator(self, device: torch.device | str | int = 0):
        if isinstance(device, int) or torch.device(device).type != "cpu":
            super().init_communicator(device)
            return
        transfer = self.get_server_info()["weight_transfer_config"] or {}
        if transfer.get("backend") != "gloo":
            raise ValueError(
                f"The vLLM server at {self.base_url} cannot take weights from a trainer on the CPU: its weight "
                f"transfer is {transfer.get('backend')}, not gloo. Start it with the line that `fipo-trl "
                "vllm-server-command --use_cpu true` prints."
            )
        from vllm.utils.network_utils import get_ip

        group = {"master_address": get_ip(), "master_port": self.group_port, "world_size": self.get_world_size() + 1}
        with ThreadPoolExecutor(max_workers=1) as executor:  # the workers join while the server deals with the request
            joined = executor.submit(
                self._post,
                f"{self.base_url}/init_weight_transfer_engine",
                json={"init_info": group | {"rank_offset": 1}},
            )
            self.communicator = GlooGroup(group["master_address"], self.group_port, 0, group["world_size"])
            joined.result()

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, Tensor]]
    ):
        send = self._send if isinstance(self.communicator, GlooGroup) else super().update_named_params
        try:
            send(metadata, named_params)
        except Exception as error:
            self._failure = self._failure_of(error)
            for _ in named_params:  # the other processes, too, gather the weights to the last
                pass

    def _send(self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, Tensor]]):
        """TRL's `update_named_params` over gloo."""
        names, dtype_names, shapes = zip(*metadata, strict=True)
        announced = {"names": names, "dtype_names": dtype_names, "shapes": shapes}
        self._start_weight_update()
        with ThreadPoolExecutor(max_workers=1) as executor:
            received = executor.submit(self._post, f"{self.base_url}/update_weights", json={"update_info": announced})
            try:
                for _, weight in named_params:
                    self.communicator.broadcast(weight.detach().contiguous())
            except RuntimeError:
                received.result()  # which knows better what became of the server
                raise
            received.result()
        self._finish_weight_update()

    def reset_prefix_cache(self):
        if self._failure is None:
            super().reset_prefix_cache()

    def generate(self, *args, **kwargs) -> dict[str, Any]:
        if self._failure is None:
            try:
                return super().generate(*args, **kwargs)
            except Exception as error:
                self._failure = self._failure_of(error)
        return dict.fromkeys(("prompt_ids", "completion_ids", "logprobs", "logprob_token_ids"), self._failure)

    def _failure_of(self, error: Exception) -> NoAnswer:
        if isinstance(error, OSError):  # as all that `requests` raises
            return NoAnswer(
                f"The vLLM server at {self.base_url} does not answer: {error}. Start it again with the line that "
                "`fipo-trl vllm-server-command` prints; then this run can go on, with --resume_from_checkpoint latest."
            )
        return NoAnswer(f"The vLLM server at {self.base_url} failed, and what it printed may say why: {error!r}")
