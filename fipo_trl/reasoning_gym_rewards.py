"""The rewards of reasoning-gym's tasks: each task's own scorer, on what stands in the last <answer>...</answer>."""

import logging

from fipo_trl.reasoning_gym_problems import dataset_of, entry_of
from fipo_trl.rewards import text_of


SCORED_CHARACTERS = 10_000  # at the end of a completion

logger = logging.getLogger(__name__)


def reasoning_gym_reward(completions: list, problem: list[str], **kwargs) -> list[float]:
    """What the task's own scorer gives for the answer: from 0 to 1, where 1 is right.

    Many scorers give something for an answer that is wrong: for its form, or for the part that is right. A completion
    without an answer in tags gets 0, as does one on which the scorer fails.

    Args:
        completions: Texts, or chats: lists of messages of which the last one is scored.
        problem: As many, as [`fipo_trl.reasoning_gym_problems.load_task`] makes them.
        **kwargs: Other columns of the dataset, unused.

    Returns:
        One reward per completion. No completion, however odd, makes it raise.

    Raises:
        ValueError: if there are not as many problems as completions.
    """
    if len(completions) != len(problem):
        raise ValueError(f"{len(completions)} completions but {len(problem)} problems: give one for each.")
    return [score(each, predicted_answer(completion)) for completion, each in zip(completions, problem, strict=True)]


def reasoning_gym_accuracy(completions: list, problem: list[str], **kwargs) -> list[float]:
    """1.0 where [`reasoning_gym_reward`] is 1, up to rounding, else 0.0. Arguments and errors are the same."""
    return [float(reward > 1 - 1e-6) for reward in reasoning_gym_reward(completions, problem)]


def predicted_answer(completion: str | list[dict]) -> str | None:
    """What stands in the last <answer>...</answer> of a completion, or `None`."""
    from reasoning_gym.utils import extract_answer

    return extract_answer(text_of(completion)[-SCORED_CHARACTERS:])


def score(problem: str, answer: str | None) -> float:
    """The task's score of an answer, 0.0 where there is none or the scorer fails."""
    if answer is None:
        return 0.0
    import json

    fields = json.loads(problem)
    entry = entry_of(problem)
    try:
        value = float(dataset_of(fields["task"], json.dumps(fields["settings"])).score_answer(answer, entry))
    except Exception as error:
        logger.warning(f"The scorer of {fields['task']} failed on {answer!r:.80}: {error!r}. It counts as 0.")
        return 0.0
    return min(max(value, 0.0), 1.0)
