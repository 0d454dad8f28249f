"""Answers to prompts, with transformers or vLLM. What one call answers does not depend on the calls before it."""

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, StoppingCriteriaList

from fipo_trl.evaluation.saved_model import SavedModel


class Sampler(Protocol):
    """Answers prompts."""

    def __call__(
        self, prompts: list[list[int]], seeds: list[int], limits: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Token ids of prompts, and a seed for each -> token ids of an answer to each, with the one that ends it.

        Args:
            limits: Tokens of each answer, at most; `max_tokens` of the sampler where there are none.
        """
        ...


AT_ONCE = 256  # answers that are sampled together, at most; vLLM runs about as many by default
# Tokens of prompts and answers that transformers holds together, at most: of Qwen2.5-7B, in bfloat16, their keys and
# values take 30 GB
TOKENS_AT_ONCE = 2**19
SHRINK_AT = 0.25  # share of the answers of a batch after whose end transformers goes on with the others alone


def default_batch_size(backend: str, context: int) -> int:
    """How many answers are sampled together.

    It must follow from settings alone, not from the memory that is free: answers depend a little on those that are
    computed beside them.

    Args:
        backend: `transformers` or `vllm`, which sees to its memory itself.
        context: Tokens of the longest prompt and of the longest answer.
    """
    return AT_ONCE if backend == "vllm" else max(1, min(AT_ONCE, TOKENS_AT_ONCE // context))


def transformers_sampler(
    policy: Any, end_ids: Collection[int], temperature: float, top_p: float, max_tokens: int
) -> Sampler:
    """Answers all prompts of a call in one batch, from a random state that the seed of its first prompt makes.

    Long answers do not keep short ones in the batch: it shrinks when a part of them has ended. Prompts that are alike,
    or differ in their last token only, are read once but for that token.

    Args:
        policy: A causal language model of transformers or PEFT, in evaluation mode, on its device.
        end_ids: Tokens that end an answer, at least one.
        max_tokens: Of an answer, at most.

    The sampler raises a `ValueError` if the batch does not fit into memory.
    """
    end_ids = list(end_ids)
    ends = torch.tensor(end_ids, device=policy.device)
    generation = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],
        return_dict_in_generate=True,  # with the cache
    )

    def have_ended(ids):
        """Which rows, (B,); an answer that ended before the last token is padded with one that ends answers."""
        return torch.isin(ids[:, -1], ends)

    def enough_have_ended(ids, scores, **kwargs):
        """Whether generation stops, the same for all rows, (B,)."""
        return (have_ended(ids).sum() >= SHRINK_AT * len(ids)).expand(len(ids))

    def until_end(ids: list[int]) -> list[int]:
        """Without the padding."""
        return next((ids[: place + 1] for place, token in enumerate(ids) if token in end_ids), ids)

    def read_once(ids, mask):
        """What the model keeps of the prompts (B, T) but for their last tokens; `None` if no two share it."""
        if not mask[:, :-1].any(dim=1).all():  # one has no other token
            return None
        prompts, which = torch.stack([ids[:, :-1], mask[:, :-1]]).unique(dim=1, return_inverse=True)
        if prompts.shape[1] == len(ids):
            return None
        generation.max_length = ids.shape[1]  # a token more, which is not used
        output = policy.generate(
            input_ids=prompts[0], attention_mask=prompts[1], past_key_values=None, generation_config=generation
        )
        if (cache := output.past_key_values) is not None:
            cache.reorder_cache(which)
        return cache

    @torch.no_grad()
    def sample(prompts, seeds, limits=None):
        limits = limits or [max_tokens] * len(prompts)
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), end_ids[0])
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(policy.device), mask.to(policy.device)
        answers: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))  # which answers the rows of the batch are
        try:
            cache = read_once(ids, mask)
            generation.max_length = longest + max(limits)
            torch.manual_seed(seeds[0])
            while running:
                output = policy.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    generation_config=generation,
                    stopping_criteria=StoppingCriteriaList([enough_have_ended]),
                )
                ids, cache = output.sequences, output.past_key_values
                done = have_ended(ids) | (ids.shape[1] == generation.max_length)
                for row in done.nonzero().flatten().tolist():
                    answers[running[row]] = until_end(ids[row, longest:].tolist())[: limits[running[row]]]
                rest = (~done).nonzero().flatten()
                running = [running[row] for row in rest.tolist()]
                ids, mask = ids[rest], pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[rest]
                if running and cache is not None:  # without one (Mamba's) the next call reads all tokens again
                    cache.reorder_cache(rest)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise ValueError(
                f"Out of memory: {len(prompts)} answers of up to {max(limits)} tokens do not fit at once. Set a "
                f"batch_size of less than {len(prompts)}, or let vLLM sample."
            ) from error
        return answers

    return sample


def vllm_sampler(
    model: SavedModel,
    temperature: float,
    top_p: float,
    max_tokens: int,
    dtype: str = "auto",
    *,
    context: int,
    tensor_parallel_size: int = 1,
    scratch: Path,
) -> Sampler:
    """Answers all prompts of a call at once, each from a random state that its own seed makes.

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

    def sample(prompts, seeds, limits=None):
        settings = [
            SamplingParams(
                seed=seed,
                temperature=temperature,
                top_p=top_p,
                max_tokens=limit,
                stop_token_ids=model.end_ids,
                detokenize=False,
            )
            for seed, limit in zip(seeds, limits or [max_tokens] * len(seeds), strict=True)
        ]
        engine.reset_prefix_cache()  # what this process has answered before must not matter
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in outputs]

    return sample
