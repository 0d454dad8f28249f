r"""The rewards of DAPO: +1 if the last `Answer:` line has the right answer, else -1, and a penalty for length.

[`dapo_reward`] gives what DAPO's public scorer gives (`math_dapo` in verl, the reward of DAPO and FIPO), character for
character: the answer is what follows the last `Answer:` in the last 300 characters; it and the solution are normalised
as in Minerva (https://arxiv.org/abs/2206.14858, appendix D.1) and compared as strings. So `**Answer:** 7`, `7%` and
`\(7\)` do not equal `7`, in the published runs as here. To compare mathematics, use TRL's `accuracy_reward`.
"""

import re
from collections.abc import Callable

from trl.rewards import get_soft_overlong_punishment


SCORED_CHARACTERS = 300  # at the end of a completion; they also bound the time that scoring one takes
NO_ANSWER = "[INVALID]"  # the public scorer's word for it

# What Minerva's normalisation replaces, in this order: articles and spaces, then LaTeX for "and" and metres
REPLACED = [
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
]
# ... and then deletes, in this order: units and other words, then LaTeX without a value
WORDS = r"""
square ways integers dollars mph inches hours km units \ldots sue points feet minutes digits cents degrees
cm gm pounds meters meals edges students childrentickets multiples
"""
DELETED = [
    *WORDS.split(),
    r"\text{s}",
    r"\text{.}",
    "\\text{\ns}",
    r"\text{}^2",
    r"\text{}^3",
    "\\text{\n}",
    r"\text{}",
    r"\mathrm{th}",
    r"^\circ",
    r"^{\circ}",
    r"\;",
    r",\!",
    "{,}",
    '"',
    r"\dots",
]


def dapo_reward(completions: list, solution: list[str], **kwargs) -> list[float]:
    """DAPO's reward: +1 where the predicted answer equals the solution, -1 elsewhere.

    Args:
        completions: Texts, or chats: lists of messages of which the last one is scored.
        solution: The right answers, as many.
        **kwargs: Other columns of the dataset, unused.

    Returns:
        One reward per completion, 1.0 or -1.0. No completion, however odd, makes it raise.

    Raises:
        ValueError: if a solution is not a string, or there are not as many as completions.

    Source: https://arxiv.org/abs/2503.14476, eq. 7, and `math_dapo.compute_score` in verl.
    """
    return [2 * accuracy - 1 for accuracy in dapo_accuracy(completions, solution)]


def dapo_accuracy(completions: list, solution: list[str], **kwargs) -> list[float]:
    """1.0 where [`dapo_reward`] is 1, else 0.0. Its mean is the accuracy. Arguments and errors are the same."""
    if len(completions) != len(solution):
        raise ValueError(f"{len(completions)} completions but {len(solution)} solutions: give one for each.")
    for index, answer in enumerate(solution):
        if not isinstance(answer, str):
            raise ValueError(f"solution[{index}] is {answer!r}. Make the column 'solution' one of strings.")
    return [
        float(predicted_answer(completion) == normalize_answer(answer))
        for completion, answer in zip(completions, solution, strict=True)
    ]


def overlong_penalty(max_completion_length: int, buffer: int) -> Callable[..., list[float]]:
    """A reward function: 0 for completions of up to `max_completion_length - buffer` tokens, then linear to -1.

    It is TRL's `get_soft_overlong_punishment`, which computes exactly this, with its arguments checked.

    Args:
        max_completion_length: Tokens at which the penalty is -1, the largest number that is generated.
        buffer: Tokens before that over which it falls. DAPO and FIPO at 32B: 4,096 of 20,480.

    Raises:
        ValueError: unless `0 < buffer <= max_completion_length`.

    Source: https://arxiv.org/abs/2503.14476, eq. 13.
    """
    if not 0 < buffer <= max_completion_length:
        raise ValueError(
            f"overlong buffer={buffer} must be at least 1 and at most max_completion_length={max_completion_length} "
            "tokens. For no penalty, leave overlong_penalty out of the rewards."
        )
    return get_soft_overlong_punishment(max_completion_length, buffer)


def predicted_answer(completion: str | list[dict]) -> str:
    """The normalised answer on the last `Answer:` line of a completion, or `NO_ANSWER`.

    Args:
        completion: A text, or a chat of which the last message is read.
    """
    found = re.findall(r"(?i)answer\s*:\s*([^\n]+)", text_of(completion)[-SCORED_CHARACTERS:])
    return normalize_answer(found[-1] if found else NO_ANSWER)


def text_of(completion: str | list[dict]) -> str:
    """The text of a completion: itself, or that of a chat's last message (of its text parts, if it has parts)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return content if isinstance(content, str) else ""  # None where a message only calls tools


def normalize_answer(answer: str) -> str:
    r"""Minerva's normal form of an answer: without spaces, units and LaTeX dressing, `\frac12` as `\frac{1}{2}`.

    Takes time quadratic in the length of the answer, at worst: 300 characters are instant, a whole completion is not.
    """
    answer = answer.split("=")[-1]
    for old, new in REPLACED:
        answer = answer.replace(old, new)
    for word in DELETED:
        answer = answer.replace(word, "")

    # Of a line with $...$, the first formula; it keeps its dollars until the shorthands below are spelled out
    answer = re.sub(r"[^$\n]*\$([^$\n]*)\$.*", r"$\1$", answer)
    for command in ("text", "textbf", "overline"):
        answer = re.sub(rf"\\{command}\{{([^}}\n]*)\}}", r"\1", answer)
    answer = re.sub(r"\\boxed\{(.*)\}", r"\1", answer)

    answer = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", answer)
    answer = re.sub(r"sqrt([^{])", r"sqrt{\1}", answer)
    answer = answer.replace("$", "")

    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()
