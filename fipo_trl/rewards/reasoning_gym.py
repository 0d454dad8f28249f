"""The rewards of reasoning-gym: the score that a task's own scorer gives to what stands in the last answer tags.

The scorers are reasoning-gym's, with what they have of partial credit and of holes (recipes/reasoning-gym/README.md
lists those that were found). They run in a process of their own: `reasoning_gym_process.py` says why.
"""

import json
import logging

from fipo_trl.rewards.dapo import text_of
from fipo_trl.rewards.reasoning_gym_process import EVALUATED, PARSED_BY_SYMPY, ask
from fipo_trl.rewards.sandbox import sandbox_or_error


SCORED_CHARACTERS = 10_000  # at the end of a completion; they also bound the time that finding the answer takes
RIGHT = 1 - 1e-6  # some scores are sums of fractions

FAILED: set[str] = set()  # tasks whose scorers have failed in this process

logger = logging.getLogger(__name__)


def reasoning_gym_reward(
    completions: list, problem: list[str], allow_unsandboxed: bool = False, **kwargs
) -> list[float]:
    """The score of each answer, from 0 to 1 (right).

    Many tasks give something to a wrong answer, for its form or for the part that is right. No answer in tags gets 0.
    So does one on which the scorer raises, or takes more than 2 s of CPU time or 4 GiB (the first of each task is in
    the log), and one that is code, where the scorer would run it.

    Args:
        completions: Texts, or chats: lists of messages of which the last one is scored.
        problem: As many, as [`fipo_trl.data.reasoning_gym.load_task`] makes them.
        allow_unsandboxed: Whether to score answers of the nine tasks whose scorers evaluate them where there is no
            sandbox. (Others are scored anywhere; in a sandbox wherever there is one.)
        **kwargs: Other columns of the dataset, unused.

    Returns:
        One reward per completion. No completion, however odd, makes it raise.

    Raises:
        ValueError: if a problem cannot be made, or there are not as many as completions; or where such an answer
            cannot be isolated.
    """
    if len(completions) != len(problem):
        raise ValueError(f"{len(completions)} completions but {len(problem)} problems: give one for each.")
    return [
        score(each, predicted_answer(completion), allow_unsandboxed)
        for completion, each in zip(completions, problem, strict=True)
    ]


def reasoning_gym_accuracy(
    completions: list, problem: list[str], allow_unsandboxed: bool = False, **kwargs
) -> list[float]:
    """1.0 where [`reasoning_gym_reward`] is 1, up to rounding, else 0.0. Arguments and errors are the same."""
    return [float(reward > RIGHT) for reward in reasoning_gym_reward(completions, problem, allow_unsandboxed)]


def predicted_answer(completion: str | list[dict]) -> str | None:
    """What stands in the last <answer>...</answer> of a completion, or `None`.

    Args:
        completion: A text, or a chat of which the last message is read.
    """
    from reasoning_gym.utils import extract_answer  # a second to import

    return extract_answer(text_of(completion)[-SCORED_CHARACTERS:])


def score(problem: str, answer: str | None, allow_unsandboxed: bool = False) -> float:
    """The score of one answer."""
    try:
        ask("make", problem)
    except RuntimeError as error:
        raise ValueError(f"problem {problem!r:.200} cannot be made: {error}") from error
    task = json.loads(problem)["task"]
    if task in EVALUATED | PARSED_BY_SYMPY:
        sandbox_or_error(allow_unsandboxed)
    if answer is None:
        return 0.0
    try:
        value = ask("score", problem, answer)
    except RuntimeError as error:
        if task not in FAILED:
            FAILED.add(task)
            logger.warning(
                f"The scorer of reasoning_gym/{task} failed on the answer {answer!r:.80} ({error}). It counts as 0, "
                "and so will others, without a warning."
            )
        return 0.0
    return value if 0 <= value <= 1 else 0.0
