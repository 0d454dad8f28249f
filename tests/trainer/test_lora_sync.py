"""With LoRA, a colocated vLLM engine gets the adapter alone, and the one of the trainer."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from tiny import make_model

from fipo_trl.trainer.lora_adapter import ENGINE_RANKS, adapter_weights, base_name, base_weights, unserved_adapter
from fipo_trl.trainer.lora_sync import AdapterEngine


CPU = torch.device("cpu")
PATTERNS = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"q_proj": 5, "o_proj": 1}}


def adapted(**settings):
    """The tiny model with an adapter that does something."""
    model = get_peft_model(make_model(), LoraConfig(**{"r": 4, "target_modules": "all-linear"} | settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 7}, {"lora_alpha": 7, "use_rslora": True}, {"use_rslora": True, **PATTERNS}]
)
def test_the_matrices_multiply_to_what_the_trainer_adds(settings):
    model = adapted(**settings)
    sent = dict(adapter_weights(model, CPU, torch.float32))
    layers = {base_name(name): layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    assert sent.keys() == {f"{name}.lora_{part}.weight" for name in layers for part in "AB"}
    for name, layer in layers.items():
        product = sent[f"{name}.lora_B.weight"] @ sent[f"{name}.lora_A.weight"]
        torch.testing.assert_close(product, layer.get_delta_weight("default"))


def test_what_is_sent_is_not_the_memory_of_the_trainer():
    model = adapted(lora_alpha=4)  # a scaling of 1
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for matrix in dict(adapter_weights(model, CPU, torch.float32)).values():
        matrix.zero_()  # vLLM scales in place
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_base_is_sent_under_its_own_names():
    model, base = adapted(), make_model()
    sent = dict(base_weights(model, CPU))
    expected = dict(base.named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, PATTERNS, {"target_modules": ["q_proj"]}])
def test_served_as_an_adapter(settings):
    assert unserved_adapter(adapted(**settings)) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "a kind that vLLM does not know (DoraLinearVariant)"),
        ({"modules_to_save": ["norm"]}, "norm.modules_to_save.default.weight is trained, too"),
        ({"bias": "all"}, "q_proj.base_layer.bias is trained, too"),
        ({"lora_bias": True}, "q_proj.lora_B.default.bias is trained, too"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "embed_tokens (Embedding) has an adapter, and is no linear layer",
        ),
        ({"trainable_token_indices": [3]}, "is trained, too"),
        ({"r": 513}, "its rank 513 is above 512"),
    ],
)
def test_merged_as_by_trl(settings, reason):
    assert reason in unserved_adapter(adapted(**settings))


def test_a_second_active_adapter_is_merged():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    assert unserved_adapter(model) is None  # it is there, and not active
    model.base_model.set_adapter(["default", "other"])
    assert unserved_adapter(model) == "2 adapters are active"


def test_ranks_are_those_of_vllm():
    config = pytest.importorskip("vllm.config.lora")
    known = config.MaxLoRARanks.__args__
    assert set(ENGINE_RANKS) == set(known) - {1}


class Asleep:
    """In place of vLLM's `LLM`, which sleeps on a GPU only."""

    def __init__(self, **settings):
        self.settings = settings

    def sleep(self, level):
        self.level = level


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_the_engine_has_room_for_the_adapter_and_keeps_the_base_when_it_sleeps(rank, room):
    engine = AdapterEngine(Asleep, rank, model="base")
    assert engine.settings == {"model": "base", "enable_lora": True, "max_lora_rank": room, "max_loras": 1}
    engine.sleep(level=2)  # as TRL asks for
    assert engine.level == 1


# With vLLM's own engine

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process for all engines: importing vLLM alone takes 10 s."""
    folder = tmp_path_factory.mktemp("adapters")
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "trainer" / "adapters_in_vllm.py"), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "results.json").read_text())


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("case", ["rslora", "patterns", "other-base"])
def test_the_engine_answers_with_the_adapter_of_the_trainer(results, case):
    seen = results[case]
    assert seen["log"] == ["vLLM serves the base, and gets the LoRA adapter alone for each generation."]
    assert len(seen["trainer"]) == 4
    assert seen["engine"] == seen["trainer"]
    assert len(set(map(str, seen["trainer"]))) == 4  # the adapters answer differently
    assert seen["unchanged"]
    # Adapters only, after the base was sent once
    first, *others = seen["bytes"]
    assert others == [seen["adapter_bytes"]] * 3
    assert first == seen["adapter_bytes"] + seen["base_bytes"]


@needs_vllm
@pytest.mark.vllm
def test_the_cache_of_prefixes_does_not_answer_for_an_older_adapter(results):
    """It is not emptied here: vLLM tells adapters apart."""
    seen = results["rslora"]
    assert seen["cached"]["new"] == [0, 0, 0, 0]
    assert min(seen["cached"]["again"]) > 0


@needs_vllm
@pytest.mark.vllm
def test_an_adapter_that_is_gone_is_an_error(results):
    assert results["rslora"]["gone"] == "LoRAAdapterNotFoundError"
    assert "sync_weights comes before generate" in results["rslora"]["too_early"]


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("dora", "the adapter is of a kind that vLLM does not know (DoraLinearVariant)"),
        ("unknown", "vLLM does not know model.layers.1.mlp.down_proj"),
        ("merged", "as TRL does it: vllm_merge_lora is true."),
    ],
)
def test_what_vllm_cannot_serve_is_merged(results, case, reason):
    (line,) = results[case]["log"]
    assert line.startswith("For each generation the LoRA adapter is merged and vLLM gets all weights")
    assert reason in line
    assert results[case]["engine"] == results[case]["trainer"]
