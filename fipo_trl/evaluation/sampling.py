"""Answers of a saved model, with transformers or vLLM: those to each prompt come from a random state of their own.

So they do not depend on what was answered before, and an evaluation that was killed can go on.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file, find_adapter_config_file
from trl.data_utils import is_conversational


# Token ids of prompts and a seed for each -> token ids of n answers to each, up to and with the token that ends them
Sampler = Callable[[list[list[int]], list[int]], list[list[list[int]]]]


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

    def load(self, dtype: str) -> torch.nn.Module:
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


def transformers_sampler(
    model: SavedModel, n: int, temperature: float, top_p: float, max_tokens: int, dtype: str = "auto"
) -> Sampler:
    """Answers one prompt at a time."""
    policy = model.load(dtype).eval()
    generation = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=max_tokens,
        num_return_sequences=n,
        eos_token_id=model.end_ids,
        pad_token_id=model.end_ids[0],
    )

    def until_end(ids: list[int]) -> list[int]:
        """Without the padding."""
        return next((ids[: place + 1] for place, token in enumerate(ids) if token in model.end_ids), ids)

    @torch.no_grad()
    def sample(prompts, seeds):
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            torch.manual_seed(seed)
            ids = torch.tensor([prompt], device=policy.device)
            output = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=generation)
            answers.append([until_end(answer) for answer in output[:, len(prompt) :].tolist()])
        return answers

    return sample


def vllm_sampler(
    model: SavedModel,
    n: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    dtype: str = "auto",
    *,
    context: int,
    tensor_parallel_size: int = 1,
    scratch: Path,
) -> Sampler:
    """Answers all prompts of a call at once.

    Args:
        context: Tokens of the longest prompt and `max_tokens`.
        scratch: Folder for a copy of the model with its adapter merged, while vLLM loads it. (vLLM's own support of
            adapters does not know every kind.)
    """
    # In this process vLLM schedules the same way each time, and it ends when the process is killed
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    merged = scratch / "merged-model"
    shutil.rmtree(merged, ignore_errors=True)
    if model.adapter:
        model.load(dtype).save_pretrained(merged)
        model.tokenizer.save_pretrained(merged)
    engine = LLM(
        model=str(merged) if model.adapter else model.base,
        dtype=dtype,
        max_model_len=context,
        tensor_parallel_size=tensor_parallel_size,
        generation_config="vllm",  # no sampling settings but those below
    )
    shutil.rmtree(merged, ignore_errors=True)

    def sample(prompts, seeds):
        settings = [
            SamplingParams(
                n=n,
                seed=seed,  # vLLM gives each of the n a seed of its own, counting from this one
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                stop_token_ids=model.end_ids,
                detokenize=False,
            )
            for seed in seeds
        ]
        engine.reset_prefix_cache()  # what this process has answered before must not matter
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        return [[list(one.token_ids) for one in sorted(each.outputs, key=lambda one: one.index)] for each in outputs]

    return sample
