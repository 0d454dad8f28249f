"""What the paper plots and TRL does not log, what completions do, and an alarm for runs that collapse.

The trainers add these numbers to TRL's own metrics, which go to `report_to`; there is no logger here. `CollapseAlarm`
is a callback that reads the logged rows, and `collapse_at` finds the same in the rows of a finished run.

Source: https://arxiv.org/abs/2603.19835, figures 3 to 5 and 9.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig


logger = get_logger(__name__)

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

# The alarm. Each bound was held against healthy and collapsing runs of the tiny task: recipes/README.md
DUAL_CLIP_SPIKE = 1e-4  # of the tokens: ratios above c are rare accidents while the clip range (1.28) holds the policy
USUAL_DUAL_CLIPS = 10.0  # ... and so many times the median of the rows before, where such accidents are usual
POLICY_KL_SPIKE = 0.05  # nats per token; PPO implementations that stop early on this estimate do so at 0.01 to 0.05
GRAD_NORM_SPIKE = 3.0  # times the median of the rows before
PATIENCE = 20  # rows after a spike of dual clips in which the rest of the signature must follow
HISTORY = 100  # rows before it that say what is usual
SIGNATURE = ("policy/dual_clip_fraction", "policy/kl", "grad_norm")  # in the order in which they spike
MEAN_LENGTH = "completions/mean_length"


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that is whole, or `None`.

    The trainer's state is written last: without it, a process was killed while it saved.
    """
    states = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    updates = {state.parent.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): state.parent for state in states}
    last = max((number for number in updates if number.isdecimal()), key=int, default=None)
    return updates.get(last)


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


# The collapse alarm


@dataclass(frozen=True)
class Collapse:
    """The numbers of an alarm. `usual_*` are medians over the rows before the spike of dual clips."""

    update: int  # optimizer update at which the signature was complete
    dual_clip_update: int  # ... at which dual clips spiked
    dual_clip_fraction: float  # then
    policy_kl: float  # nats per token, the largest from then on
    grad_norm: float  # the largest from then on
    usual_grad_norm: float
    length: float | None  # mean length of the last generation, in tokens; None if it was never logged
    usual_length: float | None

    def __str__(self):
        numbers = (
            f"dual-clip fraction {self.dual_clip_fraction:.2g} at update {self.dual_clip_update}, then policy KL "
            f"{self.policy_kl:.2g} nats per token (alarm above {POLICY_KL_SPIKE}) and gradient norm "
            f"{self.grad_norm:.2g} (usually {self.usual_grad_norm:.2g})"
        )
        if self.usual_length is None:
            return numbers
        return f"{numbers}; mean length {self.length:.0f} tokens (usually {self.usual_length:.0f})"


def collapse_at(rows: list[dict]) -> Collapse | None:
    """Whether the last of these logged rows completes the signature of a collapse.

    In the paper, a run without the participation mask collapsed so: the share of dual-clipped tokens spiked, then
    policy KL and gradient norm, then answers became short. Dual clips must have spiked in one of the last `PATIENCE`
    rows, and from there on policy KL and gradient norm. Short answers come last, when the policy is lost: they are
    told, not waited for.

    Args:
        rows: `state.log_history` of a `FIPOTrainer` or `DAPOTrainer`, or its beginning. Rows of evaluations and others
            without a metric of the signature do not count.
    """
    rows = [row for row in rows if None not in map(row.get, SIGNATURE)]
    for first in range(max(1, len(rows) - PATIENCE), len(rows)):
        before, since = rows[max(0, first - HISTORY) : first], rows[first:]
        dual_clips, policy_kl, grad_norm = ([row[name] for row in since] for name in SIGNATURE)
        usual_dual_clips, _, usual_grad_norm = (median(row[name] for row in before) for name in SIGNATURE)
        if (
            dual_clips[0] > max(DUAL_CLIP_SPIKE, USUAL_DUAL_CLIPS * usual_dual_clips)
            and max(policy_kl) > POLICY_KL_SPIKE
            and not max(grad_norm) <= GRAD_NORM_SPIKE * usual_grad_norm  # or not a number
        ):
            usual_lengths = [row[MEAN_LENGTH] for row in before if row.get(MEAN_LENGTH) is not None]
            lengths = usual_lengths + [row[MEAN_LENGTH] for row in since if row.get(MEAN_LENGTH) is not None]
            return Collapse(
                update=rows[-1]["step"],
                dual_clip_update=since[0]["step"],
                dual_clip_fraction=dual_clips[0],
                policy_kl=max(policy_kl),
                grad_norm=max(grad_norm),
                usual_grad_norm=usual_grad_norm,
                length=lengths[-1] if lengths else None,
                usual_length=median(usual_lengths) if usual_lengths else None,
            )
    return None


class CollapseAlarm(TrainerCallback):
    """Warns once, with the numbers, when a run shows the signature of a collapse (see `collapse_at`).

    It also saves a checkpoint, whatever `save_strategy` says. It reads each row that is logged, every `logging_steps`
    updates; all ranks see the same rows and decide alike. A run resumed from that checkpoint is not stopped again.

    Args:
        on_collapse: "warn" lets the run go on; "stop" ends it after the checkpoint, and `stopped` is then the alarm.

    Raises:
        ValueError: for another `on_collapse`.
    """

    def __init__(self, on_collapse: str = "warn"):
        if on_collapse not in ("warn", "stop"):
            raise ValueError(f"on_collapse='{on_collapse}' must be 'warn' or 'stop'.")
        self.on_collapse = on_collapse
        self.stopped: Collapse | None = None
        self._silent = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._silent = collapse_at(state.log_history) is not None

    def on_log(self, args, state, control, logs, **kwargs):
        if self._silent or "loss" not in logs:  # rows of evaluations and the summary at the end have none
            return
        if missing := [name for name in SIGNATURE if name not in logs]:
            self._silent = True
            logger.warning(
                f"CollapseAlarm is off, for {' and '.join(missing)} is not logged: policy/* needs FIPOTrainer or "
                "DAPOTrainer, and grad_norm needs max_grad_norm > 0."
            )
            return
        collapse = collapse_at(state.log_history)
        if collapse is None:
            return
        self._silent = True
        control.should_save = True
        if self.on_collapse == "stop":
            self.stopped = collapse
            control.should_training_stop = True
        logger.warning(
            f"This run looks as if it collapses: {collapse}. A checkpoint is saved at update {collapse.update}"
            f"{', and training stops' if self.stopped else ''}. Go back to an earlier one with a lower learning_rate, "
            "fewer updates per generation (steps_per_generation), a shorter future_kl_half_life or narrower "
            "influence weights."
        )
