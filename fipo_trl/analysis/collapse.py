"""The alarm for runs that collapse: `CollapseAlarm` in training, `collapse_at` in the rows of a finished run.

Source: https://arxiv.org/abs/2603.19835, figure 9.
"""

from dataclasses import dataclass
from statistics import median

from accelerate.logging import get_logger
from transformers import TrainerCallback


logger = get_logger(__name__)

# The alarm. Each bound was held against healthy and collapsing runs of the tiny task: recipes/tiny/README.md
DUAL_CLIP_SPIKE = 1e-4  # of the tokens: ratios above c are rare accidents while the clip range (1.28) holds the policy
USUAL_DUAL_CLIPS = 10.0  # ... and so many times the median of the rows before, where such accidents are usual
POLICY_KL_SPIKE = 0.05  # nats per token; PPO implementations that stop early on this estimate do so at 0.01 to 0.05
GRAD_NORM_SPIKE = 3.0  # times the median of the rows before
PATIENCE = 20  # rows after a spike of dual clips in which the rest of the signature must follow
HISTORY = 100  # rows before it that say what is usual
SIGNATURE = ("policy/dual_clip_fraction", "policy/kl", "grad_norm")  # in the order in which they spike
MEAN_LENGTH = "completions/mean_length"


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
