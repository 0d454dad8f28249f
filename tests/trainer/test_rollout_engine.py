"""What the trainer does about an engine that samples for it, without the engine. test_vllm.py has the real one."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny import BASE, fixed_rollouts, generate, logged, make_args, make_trainer, parameters, scored_rollouts
from transformers import AutoTokenizer

from fipo_trl.trainer import engine
from fipo_trl.trainer.engine import EngineMismatch, check_ends


def mismatch(trainer):
    return {name: trainer._metrics["train"][f"engine_mismatch/{name}"] for name in ("mean", "max", "nan_tokens")}


def test_mismatch_is_that_of_the_scored_tokens(tmp_path):
    trainer = make_trainer(tmp_path, keywords={"rollout_func": scored_rollouts}, group_by_length=False)
    seen = {}
    measure = trainer._engine_mismatch.measure
    trainer._engine_mismatch.measure = lambda outputs, fresh: measure(seen.setdefault("outputs", outputs), fresh)
    generate(trainer)
    differences, missing = [], 0
    outputs = seen["outputs"]
    for engine_row, old, mask in zip(
        outputs["sampling_per_token_logps"].tolist(),
        outputs["old_per_token_logps"].tolist(),
        outputs["completion_mask"].tolist(),
        strict=True,
    ):
        for engine_logp, old_logp, scored in zip(engine_row, old, mask, strict=True):
            if scored and math.isnan(engine_logp):
                missing += 1
            elif scored:
                differences.append(abs(engine_logp - old_logp))
    assert missing > 0
    assert mismatch(trainer) == {
        "mean": [pytest.approx(sum(differences) / len(differences), rel=1e-5)],
        "max": [pytest.approx(max(differences), rel=1e-5)],
        "nan_tokens": [missing],
    }


def of(**metrics):
    return {f"engine_mismatch/{name}": value for name, value in metrics.items()}


def test_output_of_tools_is_not_compared():
    batch = {
        "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
        "old_per_token_logps": torch.tensor([[-1.0, -1.0, -1.0, 0.0]]),
        "sampling_per_token_logps": torch.tensor([[-1.5, 9.0, -1.25, 9.0]]),
    }
    measure = EngineMismatch(Accelerator(cpu=True), truncated=False).measure
    assert measure(batch) == of(mean=0.375, max=0.5, nan_tokens=0)
    batch["sampling_per_token_logps"] = torch.full((1, 4), math.nan)
    assert measure(batch) == of(mean=0.0, max=0.0, nan_tokens=2)


def test_mismatch_is_logged_each_generation_and_changes_nothing(tmp_path):
    """Not the updates either: π_old is the trainer's, and log-probs that the engine lacks are harmless."""
    trainers = []
    for rollouts in (scored_rollouts, fixed_rollouts):
        trainer = make_trainer(tmp_path, keywords={"rollout_func": rollouts})
        trainer.train()
        trainers.append(trainer)
    with_engine, without = trainers
    assert len(logged(with_engine, "engine_mismatch/mean")) == 2  # 16 updates, 8 per generation
    nan_tokens = logged(with_engine, "engine_mismatch/nan_tokens")
    assert len(nan_tokens) == 2
    assert min(nan_tokens) > 0
    assert not logged(without, "engine_mismatch/mean")
    for name, value in parameters(without).items():
        assert torch.equal(parameters(with_engine)[name], value)
        assert value.isfinite().all()


def test_warns_once_past_the_bound(tmp_path, caplog, monkeypatch):
    make_trainer(tmp_path, keywords={"rollout_func": scored_rollouts}).train()
    warnings = [record.message for record in caplog.records if "engine_mismatch/mean" in record.message]
    assert len(warnings) == 1
    assert "above 0.05" in warnings[0]
    assert "token_truncate" in warnings[0]
    caplog.clear()
    monkeypatch.setattr(engine, "MISMATCH_BOUND", 100.0)
    make_trainer(tmp_path, keywords={"rollout_func": scored_rollouts}).train()
    assert "engine_mismatch" not in caplog.text


def test_a_context_without_room_for_a_prompt_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vllm_max_model_length=16 leaves no room.*max_completion_length=16"):
        make_args(tmp_path, use_vllm=True, vllm_max_model_length=16)
    make_args(tmp_path, use_vllm=True, vllm_max_model_length=17)
    make_args(tmp_path, vllm_max_model_length=16)  # without vLLM nothing reads it


def test_a_context_too_short_for_the_longest_prompt_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, prompts=["a1="] * 50 + ["a1b2c3="] + ["a1b2="] * 50)
    trainer.use_vllm, trainer.vllm_mode = True, "colocate"
    model_config = SimpleNamespace(max_model_len=7 + 16)
    engine = SimpleNamespace(model_config=model_config)
    trainer.vllm_generation = SimpleNamespace(llm=SimpleNamespace(llm_engine=engine))
    check_ends(trainer)
    model_config.max_model_len -= 1
    with pytest.raises(ValueError, match=r"longest prompt \(7 tokens\).*need 23.*Set vllm_max_model_length=23"):
        check_ends(trainer)


def test_a_tokenizer_without_eos_is_refused(tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    tokenizer.eos_token = None
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(ValueError, match="has no EOS token"):
        make_trainer(tmp_path)


def test_one_update_per_generation_has_nothing_to_compare(tmp_path):
    off = {"influence_weight_min": 1.0, "influence_weight_max": 1.0, "steps_per_generation": 1}
    trainer = make_trainer(tmp_path, **off, keywords={"rollout_func": scored_rollouts})
    trainer.train()
    assert not logged(trainer, "engine_mismatch/mean")
