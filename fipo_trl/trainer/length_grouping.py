"""Micro-batches without the padding of others: rows of similar length together, padding columns cut off.

TRL pads every row of a generation to the longest prompt and the longest completion of all its rows, and keeps that
padding in every micro-batch: with long-tailed answers most of an update is computed on padding. But which rows share
a micro-batch does not matter to the sum over an optimizer update, so the rows of an update can be sorted by length,
dealt to its micro-batches, and each of these cut to its own longest prompt and completion.

Every rank deals the same number of rows to each micro-step, longest first. So at any micro-step all ranks hold rows of
the same quantile of length, and none waits long for another where they meet in each forward pass (FSDP, ZeRO-3).

Tensors in, tensors out; nothing here knows a trainer. Shapes: B rows, P prompt columns, T completion columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor


PROMPT_KEYS = {"prompt_ids", "prompt_mask"}  # (B, P), padded on the left
COMPLETION_KEYS = {  # (B, T), padded on the right; the ratio is (B, 1) if it is one per sequence
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
}
ROW_KEYS = {"advantages", "rewards"}  # (B,)
BATCH_KEYS = {"num_items_in_batch"}  # of the whole generation, no matter the row

Batch = dict[str, Any]  # tensors, or None

logger = get_logger(__name__)


def unknown_keys(batch: Batch) -> set[str]:
    """Keys that this module cannot reorder, such as the pixels of images, which do not come one row each."""
    known = PROMPT_KEYS | COMPLETION_KEYS | ROW_KEYS | BATCH_KEYS
    return {key for key, value in batch.items() if value is not None and key not in known}


def lengths(prompt_mask: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that each row needs, (B,) each: prompts from the right end, completions from the left end."""
    prompt_columns = torch.arange(prompt_mask.shape[1], 0, -1, device=prompt_mask.device)
    completion_columns = torch.arange(1, completion_mask.shape[1] + 1, device=completion_mask.device)
    return (prompt_mask * prompt_columns).amax(dim=1), (completion_mask * completion_columns).amax(dim=1)


def trim(batch: Batch) -> Batch:
    """Cut the columns that are padding in every row. At least one prompt and one completion column stay."""
    prompt_lengths, completion_lengths = lengths(batch["prompt_mask"], batch["completion_mask"])
    prompt_columns = max(1, int(prompt_lengths.max()))
    completion_columns = max(1, int(completion_lengths.max()))
    width = batch["completion_mask"].shape[1]

    def cut(key, value):
        if value is None:
            return None
        if key in PROMPT_KEYS:
            return value[:, -prompt_columns:].clone()  # a view would keep the padding in memory
        if key in COMPLETION_KEYS and value.shape[1] == width:
            return value[:, :completion_columns].clone()
        return value

    return {key: cut(key, value) for key, value in batch.items()}


def regroup(micro_batches: list[Batch], per_update: int) -> list[Batch]:
    """Sort the rows of each optimizer update by length, longest first, and deal them to its micro-batches.

    Args:
        micro_batches: dictionaries of tensors with the same keys, B and padding, in the order in which they are used.
        per_update: how many consecutive micro-batches make one optimizer update; divides their number.

    Returns:
        As many micro-batches, of B rows each, trimmed.
    """
    regrouped = []
    for start in range(0, len(micro_batches), per_update):
        update = micro_batches[start : start + per_update]
        rows = {
            key: value if value is None or key in BATCH_KEYS else torch.cat([batch[key] for batch in update])
            for key, value in update[0].items()
        }
        prompt_lengths, completion_lengths = lengths(rows["prompt_mask"], rows["completion_mask"])
        order = (prompt_lengths + completion_lengths).argsort(descending=True, stable=True)
        for share in order.chunk(per_update):
            regrouped.append(
                trim(
                    {key: value if value is None or key in BATCH_KEYS else value[share] for key, value in rows.items()}
                )
            )
    return regrouped


class LengthGrouping:
    """Groups the micro-batches of each generation of a run, as far as that changes no update.

    Args:
        per_update: how many micro-batches make one optimizer update.
        tied: what makes the loss of a row depend on the other rows of its micro-batch, in words. Then micro-batches
            are cut, not sorted. The log says so, once.
    """

    def __init__(self, per_update: int, tied: Sequence[str]):
        self.per_update = per_update
        self.tied = tied
        self.explained = False

    def __call__(self, micro_batches: list[Batch]) -> list[Batch]:
        if unknown := unknown_keys(micro_batches[0]):
            self._explain(f"micro-batches with {', '.join(sorted(unknown))} are neither sorted nor cut")
            return micro_batches
        if self.tied:
            self._explain(f"with {' and '.join(self.tied)} micro-batches are cut, but not sorted")
            return [trim(batch) for batch in micro_batches]
        return regroup(micro_batches, self.per_update)

    def _explain(self, reason: str):
        if not self.explained:
            logger.warning(f"group_by_length: {reason}.")
            self.explained = True


def log_probs_by_length(log_probs, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs):
    """Call `log_probs` on rows of similar length, without their common padding, in place of all rows as they come.

    For passes without gradient over a whole generation. What cannot be reordered goes to `log_probs` unchanged.

    Args:
        log_probs: `GRPOTrainer._get_per_token_logps_and_entropies`.
        model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs: its arguments. `input_ids` are
            (B, P + T) with T = `logits_to_keep`.

    Returns:
        What `log_probs` returns. Log-probabilities (B, T) of padding are 0.
    """
    columns = input_ids.shape[1]
    if batch_size is None or any(value is not None for value in kwargs.values()):
        return log_probs(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs)
    prompt_columns = columns - logits_to_keep
    prompt_lengths, completion_lengths = lengths(
        attention_mask[:, :prompt_columns], attention_mask[:, prompt_columns:]
    )
    result = None
    for rows in (prompt_lengths + completion_lengths).argsort(descending=True).split(batch_size):
        first = prompt_columns - max(1, int(prompt_lengths[rows].max()))
        kept = max(1, int(completion_lengths[rows].max()))
        window = slice(first, prompt_columns + kept)
        values, _, _ = log_probs(model, input_ids[rows, window], attention_mask[rows, window], kept)
        if result is None:
            result = values.new_zeros(len(input_ids), logits_to_keep)
        result[rows, :kept] = values
    return result, None, None
