"""Token credit: what FIPO made of each token of some completions. Training stores traces; `analysis` shows them.

A trace is made of the last update of a generation, where the policy is farthest from the one that generated: its
completions are seen with the weights that the loss applied to them. It is a parquet file with one row per completion,

    prompt              string
    tokens              list of string: joined, they are the completion; "" for a token that begins a character only
    completion_ids      list of int32
    reward, advantage   float32; the reward is the weighted sum over the reward functions, NaN if unknown
    weight              list of float32: f
    future_kl           list of float32: F, nats
    log_ratio           list of float32: d = log pi_theta - log pi_old, nats, clamped as for F
    state               list of uint8: `TokenState` flags
    dropped             bool: the completion left the loss

and its metadata hold the settings. Values are float32, as in the loss: float16 cannot tell a weight of 1.0001 from 1.
"""

import enum
import json
import math
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fipo_trl.objective.influence import LOG_RATIO_LIMIT, InfluenceWeights


FOLDER = "token_credit"  # in the output directory of the run
METADATA = b"fipo_token_credit"  # the key of the settings in the parquet file
MAX_COMPLETIONS = 64  # per trace: 64 completions of 20,480 tokens are 22 MB before compression, and their text
WINDOW = 8  # tokens decoded together, at least
PATIENCE = 16  # tokens that a character may take; UTF-8 has at most 4 bytes
FLOATS = pa.list_(pa.float32())
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "tokens": pa.list_(pa.string()),
        "completion_ids": pa.list_(pa.int32()),
        "reward": pa.float32(),
        "advantage": pa.float32(),
        "weight": FLOATS,
        "future_kl": FLOATS,
        "log_ratio": FLOATS,
        "state": pa.list_(pa.uint8()),
        "dropped": pa.bool_(),
    }
)


class TokenState(enum.IntFlag):
    """What else happened to a token, beside its weight. The page says it in words."""

    UNSCORED = 1  # a tool's output: no part in the loss
    CLIPPED = 2  # the clipped objective gives it no gradient: the ratio has gone far enough to its advantage's side
    MASKED = 4  # ratio > c: no part in Future-KL
    SAFETY_CAPPED = 8  # A < 0 and ratio > s: weight clipped to [0.8, 1.0]
    DUAL_CLIPPED = 16  # A < 0 and ratio > c: no gradient either


class TokenCreditTracer:
    """Stores a trace of every `token_credit_every`-th generation, as OUTPUT_DIR/token_credit/step_UPDATE.parquet.

    Only the first process makes one, of the completions that it holds itself: nothing is gathered. Where it holds more
    than `MAX_COMPLETIONS` in the update, every second, third, ... is taken in the order of use, which with
    `group_by_length` is that of length: short and long ones come in proportion.

    A trace begins and ends within one update, hence between two checkpoints: a run that is resumed writes what an
    uninterrupted one would, over what is there.
    """

    def __init__(self, args, tokenizer):
        self.args = args  # a FIPOConfig
        self.tokenizer = tokenizer
        self.rows = []  # of the trace at hand

    def record(
        self, micro_step: int, update: int, inputs: dict[str, Tensor], log_ratio: Tensor, influence: InfluenceWeights
    ):
        """Look at a micro-batch whose weights have just been made; write the trace when it is complete.

        Args:
            micro_step: micro-batches used before this one, since training began.
            update: number of the optimizer update at hand, from 1.
            inputs: TRL's, with the advantages (B,) before they are weighted, and `rewards` (B,). These are missing
                where the generation was begun without traces, and the run resumed with them.
            log_ratio: (B, T).
            influence: of these inputs.
        """
        args = self.args
        per_generation = args.steps_per_generation * args.num_iterations
        generation, place = divmod(micro_step, per_generation)
        place -= per_generation - args.gradient_accumulation_steps  # within the last update
        if (generation + 1) % args.token_credit_every or place < 0 or args.process_index > 0:
            return
        batch_size = len(log_ratio)
        stride = math.ceil(batch_size * args.gradient_accumulation_steps / MAX_COMPLETIONS)
        if place == 0:
            self.rows = []
        for row in range(batch_size):
            if (place * batch_size + row) % stride == 0:
                self.rows.append(self._trace(row, inputs, log_ratio, influence))
        if place == args.gradient_accumulation_steps - 1:
            write_trace(args.output_dir, update, self.rows, self._settings(update, generation + 1))
            self.rows = []

    def _trace(self, row: int, inputs, log_ratio, influence) -> dict:
        length = int(inputs["completion_mask"][row].sum())  # TRL pads completions on the right
        log_ratio = log_ratio[row, :length].float().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        advantage = inputs["advantages"][row].item()
        ratio = log_ratio.exp()
        scored = (
            inputs["tool_mask"][row, :length].bool()
            if "tool_mask" in inputs
            else torch.ones_like(ratio, dtype=torch.bool)
        )
        epsilon_high = self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high
        clipped = ratio > 1 + epsilon_high if advantage > 0 else (ratio < 1 - self.args.epsilon) & (advantage < 0)
        flags = {
            TokenState.UNSCORED: ~scored,
            TokenState.CLIPPED: clipped & scored,
            TokenState.MASKED: influence.masked[row, :length],
            TokenState.SAFETY_CAPPED: influence.safety_capped[row, :length],
            TokenState.DUAL_CLIPPED: influence.dual_clipped[row, :length],
        }
        completion_ids = inputs["completion_ids"][row, :length].tolist()
        prompt_ids = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        return {
            "prompt": "".join(token_texts(self.tokenizer, prompt_ids)),
            "tokens": token_texts(self.tokenizer, completion_ids),
            "completion_ids": completion_ids,
            "reward": inputs["rewards"][row].item() if "rewards" in inputs else math.nan,
            "advantage": advantage,
            "weight": influence.weights[row, :length].float().cpu().numpy(),
            "future_kl": influence.future_kl[row, :length].float().cpu().numpy(),
            "log_ratio": log_ratio.masked_fill(~scored, 0.0).cpu().numpy(),
            "state": sum(flag * mask.byte() for flag, mask in flags.items()).cpu().numpy(),
            "dropped": self.args.drop_dual_clipped_sequences and not influence.kept[row].item(),
        }

    def _settings(self, update: int, generation: int) -> dict:
        names = ["future_kl_half_life", "influence_weight_min", "influence_weight_max", "delta"]
        names += ["influence_safety_ratio", "epsilon", "epsilon_high", "token_credit_every"]
        return {"step": update, "generation": generation} | {name: getattr(self.args, name) for name in names}


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds. Joined, they are what the tokenizer makes of all.

    A token alone may be a part of a character, or lose the space before it. So each is decoded with some before it. A
    result that ends in U+FFFD may end within a character, whose text then goes to the token that completes it. More
    than `PATIENCE` such tokens in a row are no text, and given as they are.
    """

    def decode(ids):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.encode(errors="replace").decode()  # a surrogate has no UTF-8

    texts = []
    start = given = 0  # of the window; characters of its text that have been given to a token
    waiting = 0  # the first token whose text has not been given
    for i in range(len(ids)):
        text = decode(ids[start : i + 1])
        if text.endswith("\ufffd") and i - waiting < PATIENCE and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[given:])
        given = len(text)
        if i - start >= WINDOW:
            start, given = waiting, len(decode(ids[waiting : i + 1]))
        waiting = i + 1
    return texts


# Files


def trace_path(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / FOLDER / f"step_{step:06d}.parquet"


def write_trace(output_dir: str | Path, step: int, rows: list[dict], settings: dict):
    """Write a trace. Nobody ever sees a part of it: the file takes its name when it is complete."""
    path = trace_path(output_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({METADATA: json.dumps(settings)}))
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(table, unfinished, compression="zstd")
    os.replace(unfinished, path)


def traced_steps(run: str | Path) -> list[int]:
    """The updates of the traces of a run, at least one, in order.

    Raises:
        ValueError: if there is no such folder or trace.
    """
    if not Path(run).is_dir():
        raise ValueError(f"{run}: there is no such folder. Give the output_dir of a training run.")
    names = (re.fullmatch(r"step_(\d{6,})\.parquet", path.name) for path in Path(run, FOLDER).glob("*"))
    steps = sorted(int(name[1]) for name in names if name)
    if not steps:
        raise ValueError(
            f"{run} holds no traces ({FOLDER}/step_*.parquet). Give the output_dir of a run that was trained with "
            "token_credit_every, such as 10: the first trace is written at the end of the tenth generation."
        )
    return steps


def read_trace(run: str | Path, step: int | None = None) -> tuple[pa.Table, dict]:
    """The trace of an update, or of the latest there is, and its settings.

    Raises:
        ValueError: if there is no such folder, trace or update, or the file cannot be read; the message says what to
            do.
    """
    steps = traced_steps(run)
    if step is not None and step not in steps:
        raise ValueError(f"{run} holds no trace of step {step}, only of {', '.join(map(str, steps))}.")
    path = trace_path(run, steps[-1] if step is None else step)
    try:
        table = pq.read_table(path)
        settings = json.loads(table.schema.metadata[METADATA])
        if table.schema.names != SCHEMA.names or not len(table):
            raise KeyError(METADATA)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read, it may have been cut off while it was copied: {error} Copy it anew, or give "
            f"another --step of {', '.join(map(str, steps))}."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no trace of this version of fipo_trl. Give another --step.") from error
    return table, settings
