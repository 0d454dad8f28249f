"""A model as it lies on disk or on the Hub, with what an evaluation asks of it before its weights are loaded."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file, find_adapter_config_file
from trl.data_utils import is_conversational


class SavedModel:
    """Where a model is, and what is needed of it before its weights are loaded.

    Args:
        name: Folder of a model, a checkpoint or a LoRA adapter, or the id of one on the Hugging Face Hub.

    Raises:
        ValueError: if there is no model, the Hub cannot be reached (found out at once, not after retries), or no
            answer would ever end.
    """

    def __init__(self, name: str):
        self.base, self.adapter = found(name), None  # `base` is the whole model; `adapter` what belongs on top of it
        if adapter_config := find_adapter_config_file(name):
            self.adapter = name
            self.base = found(json.loads(Path(adapter_config).read_text())["base_model_name_or_path"])
        self.config = AutoConfig.from_pretrained(self.base)
        own_tokenizer = self.adapter and os.path.exists(os.path.join(self.adapter, "tokenizer_config.json"))
        self.tokenizer = AutoTokenizer.from_pretrained(self.adapter if own_tokenizer else self.base)
        try:
            end_ids = GenerationConfig.from_pretrained(self.base).eos_token_id
        except OSError:  # there is none
            end_ids = self.config.eos_token_id
        end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
        self.end_ids = sorted({*end_ids, self.tokenizer.eos_token_id} - {None})
        if not self.end_ids:
            raise ValueError(f"model: neither {self.base} nor its tokenizer has an EOS token. No answer would end.")

    def version(self) -> list[str]:
        """What changes when the model is trained on: names, sizes and times of its files, or a commit of the Hub."""
        versions = []
        for name, config in [(self.base, "config.json"), (self.adapter, "adapter_config.json")]:
            if name and os.path.isdir(name):
                files = [path for path in Path(name).iterdir() if path.suffix in (".safetensors", ".bin", ".json")]
                seen = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
                versions.append(hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16])
            elif name:
                versions.append(Path(cached_file(name, config)).parent.name)
        return versions

    def encode(self, prompts: list, max_tokens: int) -> list[list[int]]:
        """Token ids of prompts (texts or chats), as the trainer makes them.

        Raises:
            ValueError: if the model's context does not hold the longest one and `max_tokens`, or the tokenizer has no
                template for chats.
        """
        if is_conversational({"prompt": prompts[0]}):
            if self.tokenizer.chat_template is None:
                raise ValueError(
                    f"model: the prompts are chats, but the tokenizer of {self.base} has no chat template."
                )
            encoded = self.tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        else:
            encoded = self.tokenizer(prompts)["input_ids"]
        longest = max(map(len, encoded))
        context = getattr(self.config, "max_position_embeddings", None)
        if context is not None and longest + max_tokens > context:
            fix = f"Set max_tokens to {context - longest}." if context > longest else "Take out the longest prompts."
            raise ValueError(
                f"max_tokens={max_tokens} and the longest prompt ({longest} tokens) need a context of "
                f"{longest + max_tokens} tokens, but the model has {context} (max_position_embeddings). {fix}"
            )
        return encoded

    def load(self, dtype: str) -> Any:
        """The weights, with the adapter merged into them."""
        model = AutoModelForCausalLM.from_pretrained(
            self.base,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map="auto" if torch.accelerator.is_available() else None,
        )
        return PeftModel.from_pretrained(model, self.adapter).merge_and_unload() if self.adapter else model


def found(name: str) -> str:
    """The name itself, if there is a model or an adapter."""
    if not os.path.isdir(name):
        try:
            if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
                HfApi().model_info(name, timeout=10)
            elif find_adapter_config_file(name) is None:
                AutoConfig.from_pretrained(name)
        except Exception as error:
            raise ValueError(
                f"model: cannot load '{name}' ({error}). Give a local folder (relative to the directory you start "
                "from; an adapter's base is looked for there, too) or the id of a model on the Hugging Face Hub. "
                "Without a network, download it elsewhere and give the folder, or set HF_HUB_OFFLINE=1 if this "
                "machine's cache has it."
            ) from error
    elif not any(os.path.exists(os.path.join(name, file)) for file in ("config.json", "adapter_config.json")):
        checkpoints = sorted(path.name for path in Path(name).glob("checkpoint-*"))
        wanted = f"one of its checkpoints, {', '.join(checkpoints)}" if checkpoints else "the folder of a saved model"
        raise ValueError(f"model: {name} holds neither config.json nor adapter_config.json. Give {wanted}.")
    return name
