"""Rows in the schema of DAPO-Math-17k -> TRL's columns `prompt` and `solution`, each problem once.

The published files repeat their problems: `BytedTsinghua-SIA/DAPO-Math-17k` has 1.79M rows for about 17k problems,
`BytedTsinghua-SIA/AIME-2024` 960 for 30. Rows that are equal are dropped in Arrow, batch by batch; only what is left
becomes Python objects and is checked.
"""

import logging

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fipo_trl.rewards.dapo import normalize_answer


READ_AT_ONCE = 50_000  # rows: tens of megabytes

logger = logging.getLogger(__name__)


def dapo_prompt(problem: str) -> list[dict]:
    """The chat that asks for a problem's answer in DAPO's words, one user turn. The public rows hold such chats."""
    text = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
        f'{problem}\n\nRemember to put your answer on its own line after "Answer:".'
    )
    return [{"role": "user", "content": text}]


def is_dapo(columns: list[str] | None) -> bool:
    """Whether these are the columns of DAPO-Math-17k, for [`from_dapo`] to convert."""
    return columns is not None and {"prompt", "reward_model"} <= set(columns) and "solution" not in columns


def from_dapo(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompt_length: int | None = None,
) -> Dataset:
    """Rows of DAPO-Math-17k's schema -> columns `prompt` (chat, unchanged) and `solution` (text), each prompt once.

    A prompt that comes with two answers which the reward tells apart is left out, since no one can say which is right;
    how many are is in the log. So is, in one line, how many rows were read, repeated, over-long and kept.

    Args:
        dataset: With the columns `prompt` (list of messages with `role` and `content`) and `reward_model` (with
            `ground_truth`, a text or a whole number). Others, such as `data_source` and `extra_info`, are not read.
        tokenizer: Applies its chat template, to count tokens. Needed for `max_prompt_length` only.
        max_prompt_length: Prompts of more tokens, generation prompt included, are left out. `None` keeps all.

    Raises:
        ValueError: for a malformed row, with its number (the first is 0) and column; for a streamed dataset; if
            `max_prompt_length` comes without a tokenizer that has a chat template; or if no row is left.

    Source: https://huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k
    """
    if not isinstance(dataset, Dataset):
        raise ValueError("A streamed dataset cannot be rid of repeated rows. Set dataset_streaming: false.")
    if max_prompt_length is not None and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"max_prompt_length={max_prompt_length} needs a tokenizer with a chat template. Give one.")
    dataset = dataset.select_columns(["prompt", "reward_model"])
    rows = first_of_equals(dataset)
    problems: dict[tuple, tuple[list[dict], str]] = {}
    contradicted = set()
    for row, example in zip(rows, dataset.select(rows), strict=True):
        prompt, answer = read(row, **example)
        key = tuple((message["role"], message["content"]) for message in prompt)
        _, known = problems.setdefault(key, (prompt, answer))
        if answer != known and normalize_answer(answer) != normalize_answer(known):
            contradicted.add(key)
    repeated = len(dataset) - len(problems)
    kept = [problem for key, problem in problems.items() if key not in contradicted]
    consistent = len(kept)
    if max_prompt_length is not None:
        lengths = prompt_lengths(tokenizer, [prompt for prompt, _ in kept])
        kept = [problem for problem, length in zip(kept, lengths, strict=True) if length <= max_prompt_length]

    limit = "over-long" if max_prompt_length is None else f"over {max_prompt_length} tokens"
    counts = (
        f"{len(dataset):,} rows read, {repeated:,} repeated, {len(contradicted):,} prompts with contradictory "
        f"answers, {consistent - len(kept):,} {limit}, {len(kept):,} kept"
    )
    if not kept:
        raise ValueError(f"No prompt is left to train on: {counts}. Raise max_prompt_length, or give other data.")
    (logger.warning if contradicted else logger.info)(f"DAPO data: {counts}.")
    return Dataset.from_dict({"prompt": [prompt for prompt, _ in kept], "solution": [answer for _, answer in kept]})


def no_longer_than(max_prompt_length: int, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows whose `prompt` (chat) has at most so many tokens, generation prompt included. The log says how many.

    Raises:
        ValueError: if no row is left, or the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"max_prompt_length={max_prompt_length} needs a tokenizer with a chat template. Give one.")
    lengths = prompt_lengths(tokenizer, dataset["prompt"][:])
    kept = [row for row, length in enumerate(lengths) if length <= max_prompt_length]
    counts = f"{len(lengths) - len(kept):,} of {len(lengths):,} prompts are over {max_prompt_length} tokens"
    if not kept:
        raise ValueError(f"No prompt is left: {counts}, the shortest has {min(lengths)}. Raise max_prompt_length.")
    logger.info(f"{counts} and left out; the longest other has {max(lengths[row] for row in kept)}.")
    return dataset.select(kept)


def first_of_equals(dataset: Dataset) -> list[int]:
    """Row numbers, rising: of rows that are equal in every column, the first."""
    seen, start = None, 0
    for batch in dataset.with_format("arrow").iter(READ_AT_ONCE):
        keys = {name: texts(batch[name].combine_chunks()) for name in batch.column_names}
        table = pa.table(keys | {"row": pa.array(range(start, start + len(batch)))})
        table = table if seen is None else pa.concat_tables([seen, table])
        seen = table.group_by(list(keys)).aggregate([("row", "min")]).rename_columns([*keys, "row"])
        start += len(batch)
    return [] if seen is None else sorted(seen["row"].to_pylist())


def texts(array: pa.Array) -> pa.Array:
    """One string per element of any Arrow array, null or nested: equal strings for equal elements only.

    (Unless the texts hold the control characters that separate records and units, which is what those are for.)
    """
    if pa.types.is_struct(array.type):
        names = sorted(field.name for field in array.type)
        fields = [texts(pc.struct_field(array, name)) for name in names]
        strings = pc.binary_join_element_wise(*fields, "\x1f") if fields else pc.cast(pc.is_valid(array), pa.string())
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = pc.fill_null(pc.cast(pc.list_value_length(array), pa.int32()), 0)
        ends = pc.cumulative_sum(lengths)
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
        strings = pc.binary_join(pa.ListArray.from_arrays(offsets, texts(pc.list_flatten(array))), "\x1e")
    else:  # also JSON, the type of a column whose rows in a .jsonl file differ in type
        strings = pc.cast(array, pa.string())
    return pc.if_else(pc.is_valid(array), strings, "\x00")


def read(row: int, prompt, reward_model) -> tuple[list[dict], str]:
    """The prompt and the answer of a row, checked."""

    def malformed(column: str, value, expected: str):
        return ValueError(
            f"Row {row} (the first is 0) is malformed in column '{column}': {expected}, got {value!r:.200}."
        )

    chat = "must be a list of messages with 'role' and 'content', the last one not blank"
    if not isinstance(prompt, list) or not prompt:
        raise malformed("prompt", prompt, chat)
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise malformed("prompt", prompt, chat)
    if not prompt[-1]["content"].strip():
        raise malformed("prompt", prompt, chat)
    answer = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise malformed("reward_model", reward_model, "must hold 'ground_truth', a text or a whole number")
    return prompt, answer


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict]]) -> list[int]:
    """Tokens of each prompt, as the trainer will tokenize it."""
    if not prompts:
        return []
    encoded = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [len(ids) for ids in encoded["input_ids"]]
