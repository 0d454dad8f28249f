"""Prompts that TRL would stumble over are refused before a model is loaded, with their row."""

import json

import pytest
from datasets import Dataset, IterableDataset
from tiny import BASE, longer_is_better, make_args
from transformers import AutoTokenizer

from fipo_trl import FIPOTrainer
from fipo_trl.data.sources import load_splits
from fipo_trl.trainer.prompts import check_prompts


def chat(*roles, content="a1="):
    return [{"role": role, "content": content} for role in roles]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{% if m.role in ['user', 'system', 'assistant'] %}{{ m.content }}{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a1=", None, "b2="], r"Row 1 .* has no prompt: None"),
        (["a1=", " "], r"Row 1 .* has no prompt: ' '"),
        ([chat("user"), []], r"Row 1 .* has no prompt: \[\]"),
        ([chat("user"), chat("user", content=" ")], r"Row 1 .* ends with an empty message of the role 'user'"),
        ([chat("user"), chat("moderator", "user")], r"Row 1.*leaves out its message of the role 'moderator'"),
        ([chat("user"), chat("tool")], r"Row 1.*the chat template refuses its messages \(no tools here\)"),
    ],
)
def test_refused(prompts, message, tokenizer):
    if "moderator" in message:
        prompts[1][0]["content"] = "be fair"
    with pytest.raises(ValueError, match=message):
        check_prompts(Dataset.from_dict({"prompt": prompts}), tokenizer)


def test_texts_beside_chats(tmp_path):
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a1=", chat("user"))))
    mixed = load_splits(str(tmp_path / "mixed.jsonl"))["train"]
    with pytest.raises(ValueError, match=r"Row 1 .* has a prompt that is a chat, but row 0 has a text"):
        check_prompts(mixed)


def test_what_is_fine(tokenizer):
    check_prompts(Dataset.from_dict({"prompt": [chat("user"), chat("system", "user"), chat("user")]}), tokenizer)
    check_prompts(Dataset.from_dict({"prompt": ["a1=", "b2="]}))
    check_prompts(IterableDataset.from_generator(lambda: iter([{"prompt": None}])))
    check_prompts(None)


def test_the_trainer_looks_before_it_loads_the_model(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a1=", None]})
    for arguments, keywords in [((rows,), {}), ((), {"train_dataset": rows})]:
        with pytest.raises(ValueError, match=r"Row 1 of the dataset \(the first is 0\) has no prompt"):
            FIPOTrainer("not/a/model", longer_is_better, make_args(tmp_path), *arguments, **keywords)
