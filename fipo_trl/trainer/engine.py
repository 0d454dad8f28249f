"""Checks of the engine that samples: that it lets completions end where the policy ends them, and samples from it."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from transformers import AutoConfig


if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

logger = get_logger(__name__)

QUANTIZED_BASE = (
    "use_vllm=True with a base in 4 or 8 bits (bitsandbytes) does not train the policy that samples: for every "
    "generation TRL merges the adapter into the quantized weights and takes it out again. Both round, so that vLLM "
    "samples from another policy, and the base drifts away from the one for which the adapter is saved. vLLM 0.28 and "
    "later do not load such weights either. Set use_vllm=False, or load the base in bfloat16 (without load_in_4bit, "
    "load_in_8bit or quantization_config)."
)
MISMATCH_BOUND = 0.05  # nats per token, the mean: bf16 alone stays below 0.03; stale weights soon exceed it


def check_base(args: "GRPOConfig", model: Any, quantization_config: Any = None):
    """Refuse a base in 4 or 8 bits that vLLM is to sample from. Call it before the model is loaded.

    Args:
        args: The configuration, which says whether vLLM samples.
        model: Of the trainer: loaded, or its name.
        quantization_config: Of the trainer, if it has one.

    Raises:
        ValueError: naming the fix.
    """
    if not args.use_vllm:
        return
    if not isinstance(model, str):
        quantized = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    else:
        settings = args.model_init_kwargs or {}
        quantization = quantization_config or settings.get("quantization_config")
        if quantization is None:
            known = {name: settings[name] for name in ("revision", "trust_remote_code") if name in settings}
            quantization = getattr(AutoConfig.from_pretrained(model, **known), "quantization_config", None) or {}
        if not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        quantized = quantization.get("load_in_4bit", False) or quantization.get("load_in_8bit", False)
    if quantized:
        raise ValueError(QUANTIZED_BASE)


def check_ends(trainer: "GRPOTrainer"):
    """Refuse what lets every completion, or every long one, stop where the policy did not end it.

    vLLM cuts a completion where its context ends, and says nothing.

    Raises:
        ValueError: for a tokenizer without EOS, or a context that does not hold the longest prompt and completion.
    """
    if None in trainer.eos_token_ids:
        raise ValueError(
            f"The tokenizer of {trainer.model.name_or_path} has no EOS token, so that no completion would end before "
            f"max_completion_length={trainer.max_completion_length}. Set eos_token on the tokenizer (an instruction "
            "model ends its turns with one, such as <|im_end|>)."
        )
    if not trainer.use_vllm or trainer.vllm_mode != "colocate" or trainer._is_vlm or trainer.environment_factories:
        return
    if not hasattr(trainer.train_dataset, "__len__"):  # a stream
        return
    longest = max(trainer.train_dataset["prompt"], key=lambda prompt: len(str(prompt)))  # in characters
    prompt_ids, *_ = trainer._tokenize_prompts([longest])
    needed, context = len(prompt_ids[0]) + trainer.max_completion_length, context_of(trainer)
    if needed > context:
        raise ValueError(
            f"vllm_max_model_length={trainer.args.vllm_max_model_length} gives the engine a context of {context} "
            f"tokens, but the longest prompt ({len(prompt_ids[0])} tokens) and max_completion_length="
            f"{trainer.max_completion_length} need {needed}: vLLM would cut long completions short without a word. "
            f"Set vllm_max_model_length={needed} (not above max_position_embeddings of the model), lower "
            "max_completion_length, or take out the longest prompts."
        )


def context_of(trainer: "GRPOTrainer") -> int:
    """Tokens that the context of a colocated vLLM engine holds."""
    return trainer.vllm_generation.llm.llm_engine.model_config.max_model_len


class EngineMismatch:
    """|log π_engine - log π_old| of the scored tokens, where an engine such as vLLM reported the former.

    The loss does not see it: π_old is computed by the trainer, lest Future-KL sums up engine noise. TRL needs no π_old
    where one update follows each generation; then there is nothing to compare. A mean above `MISMATCH_BOUND` is warned
    of, once.

    Args:
        truncated: Whether sampling leaves tokens out (top_p, top_k, min_p). Then the engine's log-probabilities are
            those of another distribution, and their ratio to the policy's is the mass that was kept.
    """

    def __init__(self, accelerator: Accelerator, truncated: bool):
        self.accelerator = accelerator
        self.truncated = truncated
        self.explained = False

    def measure(self, generation: dict[str, Tensor], fresh: Tensor | None = None) -> dict[str, float]:
        """The mean and the largest mismatch in nats per token, and the scored tokens without a log-prob of the engine.

        Args:
            generation: What TRL's `_generate_and_score_completions` returns.
            fresh: (B,), false for completions that were sampled from an earlier policy: they tell nothing.

        Returns:
            Metrics, over all processes; none where there is nothing to compare.
        """
        engine_logps = generation.get("sampling_per_token_logps")  # (B, T), NaN where the engine had none
        old_logps = generation.get("old_per_token_logps")  # (B, T)
        if engine_logps is None or old_logps is None:
            return {}
        scored = generation["completion_mask"].bool()
        if "tool_mask" in generation:
            scored = scored & generation["tool_mask"].bool()
        if fresh is not None:
            scored = scored & fresh.unsqueeze(1)
        mismatch = (engine_logps - old_logps).abs()
        known = scored & mismatch.isfinite()
        mismatch = mismatch.masked_fill(~known, 0.0)
        local = torch.stack([mismatch.sum(), known.sum(), (scored & ~known).sum(), mismatch.max()])
        gathered = self.accelerator.gather(local.unsqueeze(0))  # (processes, 4)
        total, tokens, nan_tokens, _ = gathered.sum(dim=0).tolist()
        mean = total / max(tokens, 1.0)
        if mean > MISMATCH_BOUND and not self.explained:
            self.explained = True
            logger.warning(self._explanation(mean))
        return {
            "engine_mismatch/mean": mean,
            "engine_mismatch/max": gathered[:, 3].max().item(),
            "engine_mismatch/nan_tokens": nan_tokens,
        }

    def _explanation(self, mean: float) -> str:
        found = (
            f"engine_mismatch/mean={mean:.3f} nats per token is above {MISMATCH_BOUND}: the engine does not sample "
            "from the policy that is trained. If it grows, weights do not reach the engine. If not, "
        )
        if self.truncated:
            return found + (
                "the engine samples from a part of the distribution: set top_p=1.0, top_k=0 and min_p=None. An "
                "importance-sampling correction would not help: its ratio would be the mass that was kept."
            )
        return found + (
            "the engine computes otherwise (precision, kernels, experts): match the precisions, or set "
            "vllm_importance_sampling_correction=True and vllm_importance_sampling_mode='token_truncate'."
        )
