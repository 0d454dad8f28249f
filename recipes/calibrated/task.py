"""Running sums with steps that may be written in several ways: the task of the calibrated study.

The problems and the reward are those of `recipes/tiny/running_sums.py`. A step, whose running sum is the last of its
digits, may be written in six ways, all as good: with one of three marks, and with a space or a comma behind it.

    a3b0c4=    a3:3 b0=3,c4>2 A:2                        one chain
               a3:3,b0=4 c4>3 ?a3=3 b0>3,c4:2 A:2        a check

So most of the entropy of an answer lies where nothing is decided, as in the answers of a large language model.
"""

import re
from random import Random

from recipes.tiny.running_sums import ALPHABET as TINY_ALPHABET
from recipes.tiny.running_sums import MODULUS, correct_answer, walked_answer


MARKS = ":=>"
ENDS = " ,"
ALPHABET = TINY_ALPHABET + ">,"
KINDS = ("one chain", "a check", "several checks")  # of answers, shortest first
CARE = 1 / 2  # each walk of the teacher slips this many times as often as the walk before it

_STEP = re.compile(r"([a-z])([0-4])[:=>]([0-4])[ ,]")


def worked_answer(rng: Random, prompt: str, max_walks: int, slip: float) -> str:
    """Writes the answer of a teacher who makes mistakes but does not know where.

    Args:
        rng: Source of the slips and of the forms.
        prompt: A problem from `make_problem`.
        max_walks: 1 answers with the end of a single walk; a larger number walks until two walks end in the same
            digit, at most so many times, and answers with the end of the last one.
        slip: Probability per step of the first walk that the running sum is one of the four wrong digits; `CARE` times
            as large in each further walk.
    """

    def step(key: str, digit: str, total: int) -> str:
        return f"{key}{digit}{rng.choice(MARKS)}{total}{rng.choice(ENDS)}"

    return walked_answer(rng, prompt, max_walks, slip, CARE, step)


def kind_of_answer(completion: str) -> str:
    """Puts a completion in one of `KINDS` by the number of its walks."""
    return KINDS[min(completion.count("?"), 2)]


def decisive_tokens(prompt: str, completion: str) -> list[bool]:
    """Where an answer was decided, as far as the task itself can tell: one value per character.

    Of a wrong answer it is the first wrong place of its last walk, with whose end it answers; or its last character,
    if that walk is right. Of a right one it is the running sums of the last walk, each of which could have gone wrong,
    and the `?` that led to it if the walk before ended wrong. A right answer after a wrong walk is luck: nothing.
    """
    chain, marker, answer = completion.rpartition("A:")
    start = (chain if marker else completion).rfind("?") + 1
    sums, wrong = follow(prompt, completion, start)
    decisive = set()
    if not marker or answer != correct_answer(prompt):
        decisive = {len(completion) - 1 if wrong is None else min(wrong, len(completion) - 1)}
    elif wrong is None:
        decisive = set(sums)
        if start and completion[start - 3 : start - 2] != answer:
            decisive.add(start - 1)
    return [place in decisive for place in range(len(completion))]


def follow(prompt: str, completion: str, start: int) -> tuple[list[int], int | None]:
    """Follows the walk that starts there.

    Returns:
        Where its running sums stand while all is right, and where it first goes wrong or ends too early, or `None`.
    """
    sums, total = [], 0
    for key, digit in zip(prompt[:-1:2], prompt[1:-1:2], strict=True):
        step = _STEP.match(completion, start)
        total = (total + int(digit)) % MODULUS
        if step is None or step.group(1, 2) != (key, digit):
            return sums, start
        if step.group(3) != str(total):
            return sums, step.start(3)
        sums.append(step.start(3))
        start = step.end()
    return sums, None
