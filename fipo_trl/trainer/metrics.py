"""What the paper plots and TRL does not log, and what completions do.

The trainers add these numbers to TRL's own metrics, which go to `report_to`; there is no logger here.

Source: https://arxiv.org/abs/2603.19835, figures 3 to 5 and 9.
"""

import re

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig


# What a completion does, in the order in which the paper sees it come up over training
BEHAVIOURS = ("no_derivation", "one_chain", "one_self_check", "several_self_checks")

# An equals sign and a number: `3 + 4 = 7`, `x = \frac{1}{2}`. A plan that computes nothing has none.
DERIVATION_PATTERN = r"=[^=\n]{0,40}?\d"
# Words with which English mathematics takes up a result again, to the end of the sentence: one sentence is one check
SELF_CHECK_PATTERN = (
    r"(?i)\b(?:wait|alternatively|double[- ]check|(?:let me|let's|let us|to|we can|i(?:'ll| will| should)) "
    r"(?:check|verify|confirm)|re-?(?:check|compute|calculate|derive|examine|verify)|"
    r"another (?:way|method|approach))\b[^.!?\n]*"
)
# The same two for programs: a plan before the code, and a trace of it on an example, or an edge case thought of.
# Recipes for programs set them.
PLAN_PATTERN = (
    r"(?im)^[ \t]*(?:\d+[.)]|step \d+)[ \t:]|\b(?:the (?:idea|plan|approach|algorithm) is|my (?:idea|plan|approach)|"
    r"we (?:can|need to|should)|first,)"
)
CHECK_BY_EXAMPLE_PATTERN = (
    r"(?i)\b(?:wait|double[- ]check|(?:let me|let's|let us|to|we can|i(?:'ll| will| should)) "
    r"(?:test|trace|check|verify|try|walk through)|(?:test|trac|check)ing (?:it |this )?(?:with|on)|"
    r"for (?:example|the (?:example|input|sample))|edge cases?)\b[^.!?\n]*"
)


# Metrics of a generation


def counters(optimizer_update: int, args: GRPOConfig) -> dict[str, int]:
    """The two clocks of a run: gradient updates made, and generations begun for them.

    The paper's "global training step" is the second.
    """
    micro_steps = optimizer_update * args.gradient_accumulation_steps
    per_generation = args.steps_per_generation * args.num_iterations
    return {"rollout_iteration": -(-micro_steps // per_generation), "optimizer_update": optimizer_update}


def generation_metrics(
    generation: dict[str, Tensor], texts: list[str], derivation: str, self_check: str, accelerator: Accelerator
) -> dict[str, float]:
    """Lengths, length-weighted advantage and behaviours of the completions of all ranks.

    Args:
        generation: What TRL's `_generate_and_score_completions` returns: `completion_mask` (B, T), `tool_mask` (B, T)
            if there are tools, `advantages` (B,).
        texts: B completions, decoded.
        derivation, self_check: See `count_self_checks`.
        accelerator: Gathers from all ranks; each must call this with as many completions.

    Returns:
        `completions/{q25,median,q75}_length` in tokens that the model wrote, interpolated between completions;
        `completions/length_weighted_advantage`, sum(L A) / sum(L) over the scored tokens (figure 4); and the shares
        `behaviour/*` of `BEHAVIOURS`.
    """
    mask = generation["completion_mask"]
    if "tool_mask" in generation:
        mask = mask * generation["tool_mask"]
    scored = mask.sum(dim=1)
    # mask_truncated_completions empties the mask of completions that ran to the longest possible length
    lengths = scored.masked_fill(scored == 0, mask.shape[1])
    behaviours = torch.tensor([behaviour(text, derivation, self_check) for text in texts], device=mask.device)
    behaviours = torch.nn.functional.one_hot(behaviours, len(BEHAVIOURS))
    columns = torch.cat([torch.stack([lengths, scored, generation["advantages"]], dim=1), behaviours], dim=1)
    lengths, scored, advantages, *behaviours = accelerator.gather(columns.double()).cpu().unbind(dim=1)
    quartiles = lengths.quantile(lengths.new_tensor([0.25, 0.5, 0.75])).tolist()
    names = [f"completions/{name}_length" for name in ("q25", "median", "q75")]
    return {
        **dict(zip(names, quartiles, strict=True)),
        "completions/length_weighted_advantage": ((scored * advantages).sum() / scored.sum().clamp(min=1)).item(),
        **{f"behaviour/{name}": share.mean().item() for name, share in zip(BEHAVIOURS, behaviours, strict=True)},
    }


def decoded_texts(completions: list, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """The texts of completions as TRL decoded them for the rewards, lest they be decoded again.

    `None` where TRL parsed them, or where tools answered between: then they are not all of the text.
    """
    if all(isinstance(completion, str) for completion in completions):
        return completions
    parsed = (getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))
    if any(parsed) or not all(len(messages) == 1 for messages in completions):
        return None
    return [message["content"] for (message,) in completions]


def count_self_checks(text: str, derivation: str = DERIVATION_PATTERN, self_check: str = SELF_CHECK_PATTERN):
    """Count how often a completion takes up again what it has derived. A heuristic: it knows words, not mathematics.

    Args:
        text: The completion.
        derivation: A regular expression for a step of a derivation. The default is an equals sign and a number.
        self_check: One for the beginning of a check. The default knows English phrases.

    Returns:
        The matches of `self_check` after the first step of a derivation (int), or `None` where there is no such step.
    """
    first_step = re.search(derivation, text)
    if first_step is None:
        return None
    return sum(1 for _ in re.compile(self_check).finditer(text, first_step.end()))


def behaviour(text: str, derivation: str = DERIVATION_PATTERN, self_check: str = SELF_CHECK_PATTERN) -> int:
    """The place of a completion in `BEHAVIOURS`, by its self-checks: none without a derivation, 0, 1, or more."""
    checks = count_self_checks(text, derivation, self_check)
    return 0 if checks is None else 1 + min(checks, 2)
