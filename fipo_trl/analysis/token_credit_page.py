"""The token credit page: one HTML file in which each token is coloured by its influence weight.

The page needs no network and runs no script but its own; what the model wrote is in it as base64 only, and becomes
text in the browser, never markup.
"""

import base64
import hashlib
import html
import json
import math
import re
import zlib
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fipo_trl.objective.influence import ACTIVE_DISTANCE
from fipo_trl.trainer.token_credit import TokenState, read_trace, trace_path


BINS = 48  # of the histogram
CREDIT_FOLDER = "credit_fidelity"  # of the true credit, in the output directory of the run
TOKENS_NAME = "tokens.parquet"


def write_page(run: str | Path, step: int | None = None) -> Path:
    """Make one HTML file of a trace, beside it.

    Returns:
        Its path.

    Raises:
        ValueError: as `read_trace`.
    """
    table, settings = read_trace(run, step)
    path = trace_path(run, settings["step"]).with_suffix(".html")
    credit = read_credit(Path(run, CREDIT_FOLDER), settings["step"])
    path.write_text(page(table, settings, Path(run).resolve().name, credit), encoding="utf-8")
    return path


def read_credit(folder: Path, step: int) -> dict[int, dict[int, list[float]]]:
    """What `fipo-trl credit-fidelity` found of a trace, `{row: {position: [credit, standard error]}}`.

    It is empty where that was not asked for.
    """
    if not (folder / TOKENS_NAME).exists():
        return {}
    credit: dict[int, dict[int, list[float]]] = {}
    for token in pq.read_table(folder / TOKENS_NAME, filters=[("step", "=", step)]).to_pylist():
        credit.setdefault(token["row"], {})[token["position"]] = [token["credit"], token["error"]]
    return credit


def page(table: pa.Table, settings: dict, title: str, credit: dict[int, dict[int, list[float]]]) -> str:
    """The HTML of a trace: the template, and each completion in a block that is opened when it is read.

    Args:
        credit: True credit, as [`read_credit`] gives it.
    """
    rows = [Completion(table, i) for i in range(len(table))]
    weights = np.concatenate([row.weight[row.scored] for row in rows])
    states = np.concatenate([row.state for row in rows])
    low = float(weights.min(initial=settings["influence_weight_min"]))
    high = float(weights.max(initial=settings["influence_weight_max"]))
    histogram, _ = np.histogram(np.log(weights), bins=BINS, range=(math.log(low), math.log(high)))
    summary = {
        "title": title,
        "settings": {name: value if _in_json(value) else str(value) for name, value in settings.items()},
        "tokens": len(states),
        "low": low,
        "high": high,
        "histogram": histogram.tolist(),
        "scored": len(weights),
        "active": np.count_nonzero(np.abs(weights - 1) > ACTIVE_DISTANCE),
        "at_min": np.count_nonzero(weights <= np.float32(settings["influence_weight_min"])),
        "at_max": np.count_nonzero(weights >= np.float32(settings["influence_weight_max"])),
        "states": [np.count_nonzero(states & flag) for flag in TokenState],
        "most_credit": max((abs(known[0]) for places in credit.values() for known in places.values()), default=1.0),
        "completions": [row.summary() | {"credit": credit.get(i, {})} for i, row in enumerate(rows)],
    }
    blocks = [json.dumps(summary, default=int, allow_nan=False).encode(), *(row.block() for row in rows)]
    template = resources.files("fipo_trl.analysis").joinpath("token_credit_page.html").read_text(encoding="utf-8")
    values = {
        "title": html.escape(title),
        "data": "\n".join(
            f'<script type="text/plain" id="data{i}">{base64.b64encode(zlib.compress(block)).decode()}</script>'
            for i, block in enumerate(blocks)
        ),
    }
    for kind in ("script", "style"):  # the policy admits what has these hashes
        (source,) = re.findall(f"<{kind}>(.*?)</{kind}>", template, flags=re.DOTALL)
        values[f"{kind}_hash"] = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _in_json(value) -> bool:
    """JSON has neither NaN, the reward of what no function scored, nor inf, a half-life without discount."""
    return not isinstance(value, float) or math.isfinite(value)


class Completion:
    """A row of a trace, as the page wants it."""

    def __init__(self, table: pa.Table, row: int):
        values = {name: table[name][row] for name in table.schema.names}
        self.tokens = values["tokens"].as_py()
        self.ids, self.weight, self.future_kl, self.log_ratio, self.state = (
            values[name].values.to_numpy() for name in ("completion_ids", "weight", "future_kl", "log_ratio", "state")
        )
        self.scored = self.state & TokenState.UNSCORED == 0
        self.prompt, self.reward, self.advantage, self.dropped = (
            values[name].as_py() for name in ("prompt", "reward", "advantage", "dropped")
        )

    def summary(self) -> dict:
        return {
            "prompt": self.prompt,
            "reward": self.reward if _in_json(self.reward) else None,
            "advantage": self.advantage,
            "length": len(self.tokens),
            "weight": float(self.weight[self.scored].mean()) if self.scored.any() else 1.0,
            "dropped": self.dropped,
        }

    def block(self) -> bytes:
        """Arrays of 4-byte numbers, the states, and the text in UTF-8. The page's `read` is its inverse."""
        lengths = [len(token.encode("utf-16-le")) // 2 for token in self.tokens]  # as JavaScript counts
        arrays = [
            np.asarray(lengths, "<u4"),
            self.ids.astype("<u4"),
            *(short(values) for values in (self.weight, self.future_kl, self.log_ratio)),
        ]
        # First all lowest bytes, then all second ones, ...: so they compress
        planes = b"".join(array.view(np.uint8).reshape(-1, 4).T.tobytes() for array in arrays)
        return planes + self.state.tobytes() + "".join(self.tokens).encode()


def short(values: np.ndarray) -> np.ndarray:
    """float32 rounded to 16 bits of mantissa, five digits: more than the page shows, and a quarter smaller."""
    return (values.astype("<f4").view("<u4") + 0x80) & np.uint32(0xFFFFFF00)
