"""The trainer's side of a vLLM server (`vllm_mode="server"`): TRL's client, with three things that it lacks.

* Where the trainer is on the CPU, weights go over gloo. TRL's client knows NCCL only.
* A LoRA adapter goes alone, where the server was started for that (`engines/adapter_worker.py`), under a name that is
  drawn for it. So the server cannot answer for another one, nor its cache of prefixes.
* Where the server is gone, or fails, the run fails in all of its processes at the same place, so that a checkpoint of
  its last update is saved (`last_update.py`), and says which server it was. Only the main process talks to the server:
  if it failed alone, the others would wait for it.
"""

import json
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from fipo_trl.engines.adapter_worker import AdapterWorker
from fipo_trl.engines.gloo_group import GlooGroup
from fipo_trl.trainer.lora_adapter import Room
from fipo_trl.trainer.trl_contract import check_client


ADAPTER_WORKER = f"{AdapterWorker.__module__}.{AdapterWorker.__name__}"
SENT = "sent by the trainer"  # in place of an adapter's folder

Announced = list[tuple[str, str, list[int]]]  # of tensors: names, dtypes, shapes


def described(weights: Iterable[tuple[str, Tensor]]) -> Announced:
    """What TRL tells a server of the weights that come."""
    return [(name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in weights]


def update_info(metadata: Announced) -> dict[str, list]:
    """That of vLLM's `/update_weights`."""
    names, dtype_names, shapes = (list(field) for field in zip(*metadata, strict=True))
    return {"names": names, "dtype_names": dtype_names, "shapes": shapes}


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

    def update_named_params(self, metadata: Announced, named_params: Iterator[tuple[str, Tensor]]):
        send = self._send if isinstance(self.communicator, GlooGroup) else super().update_named_params
        try:
            send(metadata, named_params)
        except Exception as error:
            self._failure = self._failure_of(error)
            for _ in named_params:  # the other processes, too, gather the weights to the last
                pass

    def _send(self, metadata: Announced, named_params: Iterator[tuple[str, Tensor]]):
        """TRL's `update_named_params` over gloo."""
        self._start_weight_update()
        self._broadcast("update_weights", {"update_info": update_info(metadata)}, named_params)
        self._finish_weight_update()

    def _broadcast(self, path: str, request: dict[str, Any], weights: Iterable[tuple[str, Tensor]]):
        """Send tensors over the group, while the server deals with the request that announces them."""
        with ThreadPoolExecutor(max_workers=1) as executor:
            received = executor.submit(self._post, f"{self.base_url}/{path}", json=request)
            try:
                if isinstance(self.communicator, GlooGroup):
                    for _, weight in weights:
                        self.communicator.broadcast(weight.detach().contiguous())
                else:
                    self._broadcast_packed(weights)
            except RuntimeError:
                received.result()  # which knows better what became of the server
                raise
            received.result()

    def _broadcast_packed(self, weights: Iterable[tuple[str, Tensor]]):
        """Over NCCL, as TRL's `update_named_params`."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        group: Any = self.communicator
        packed_nccl_broadcast_producer(
            iterator=iter(weights), group=group, src=0, post_iter_func=lambda item: item[1].to(group.device)
        )

    def room(self) -> Room:
        """For adapters; of rank 0, where the server was started without the options for them."""
        info = self._get(f"{self.base_url}/server_info", params={"config_format": "json"})
        parallel, lora = info["vllm_config"]["parallel_config"], info["vllm_config"]["lora_config"]
        # With several engines, each may have a process for requests, which knows the adapters that it loaded
        one_with_worker = (parallel["worker_extension_cls"], parallel["data_parallel_size"]) == (ADAPTER_WORKER, 1)
        if not (lora and one_with_worker and info["vllm_env"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")):
            return Room(0, torch.float32, set())
        answers = self._post(f"{self.base_url}/collective_rpc", json={"method": "served_modules"})["results"]
        dtype = getattr(torch, lora["lora_dtype"].removeprefix("torch."))
        return Room(lora["max_lora_rank"], dtype, set(answers[0]))

    def serve(self, adapter: dict[str, Tensor]):
        """Answer with this adapter from now on, and forget those before, an earlier run's too.

        Args:
            adapter: As `adapter_weights` gives it.
        """
        if self._failure is not None:
            return
        name = f"adapter-{secrets.token_hex(8)}"
        announced = json.dumps(update_info(described(adapter.items())))  # as /collective_rpc takes strings only
        try:
            request = {"method": "receive_adapter", "args": [name, announced]}
            self._broadcast("collective_rpc", request, adapter.items())
            self._name_adapter("load", lora_name=name, lora_path=SENT)
            for known in self._get(f"{self.base_url}/v1/models")["data"]:
                if known["root"] == SENT and known["id"] != name:
                    self._name_adapter("unload", lora_name=known["id"])
            self.model = name
        except Exception as error:
            self._failure = self._failure_of(error)

    def _name_adapter(self, action: str, **fields: str):
        response = self.session.post(f"{self.base_url}/v1/{action}_lora_adapter", json=fields)
        if response.status_code != 200:
            raise RuntimeError(f"/v1/{action}_lora_adapter: {response.status_code}, {response.text}")

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
