"""Completions -> right or wrong, and their answers, by a reward function."""

import functools
import sys
from collections.abc import Callable, Hashable


def answers_beside(accuracy: Callable) -> Callable[..., Hashable] | None:
    """What reads the answer out of a completion for a reward function: `predicted_answer` in the module of it.

    So `fipo_trl.rewards.dapo_accuracy` comes with `fipo_trl.rewards.predicted_answer`. `None` where there is none.
    """
    function = accuracy.func if isinstance(accuracy, functools.partial) else accuracy
    return getattr(sys.modules.get(getattr(function, "__module__", "")), "predicted_answer", None)


def score(accuracy: Callable, prompts: list, completions: list, **columns) -> tuple[list[bool], list | None]:
    """Ask a reward function which completions are right, and [`answers_beside`] it for their answers.

    Args:
        accuracy: Called as TRL calls reward functions. It must give 1 (right) or 0 (wrong).
        prompts, completions: Texts, or chats.
        **columns: Other columns of the dataset, such as `solution`, as many as completions.

    Returns:
        Whether each completion is right, and its answer; or `None` where nothing tells the answers.

    Raises:
        ValueError: if the function gives anything else than one 0 or 1 per completion.
    """
    values = accuracy(prompts=prompts, completions=completions, **columns)
    if not isinstance(values, list) or len(values) != len(completions) or not all(v in (0, 1) for v in values):
        raise ValueError(
            f"{getattr(accuracy, '__name__', accuracy)} gave {values!s:.80} for {len(completions)} completions. An "
            "evaluation needs a reward function that gives 1 (right) or 0 (wrong) for each: dapo_accuracy, "
            "accuracy_reward, or one of your own."
        )
    answer_of = answers_beside(accuracy)
    return [bool(value) for value in values], answer_of and [answer_of(completion) for completion in completions]
