"""Running sums modulo 5: a reasoning task that a language model of 150,000 weights can learn in a minute.

A prompt names digits by their position, `a3b0c4=`, and asks for their sum modulo 5. A completion has one character per
token. It may guess the sum at once, write a chain of running sums (key, digit, sum so far), or check a chain by
walking it again after a `?`:

    A:2                                           no chain
    a3:3 b0:3 c4:2 A:2                            one chain
    a3:3 b0:3 c4:2 ?a3:3 b0:3 c4:2 A:2            a check
    a3:3 b0:4 c4:3 ?a3:3 b0:3 c4:2 ?a3:3 b0:3 c4:2 A:2    several checks

A walk slips now and then, and what follows a slip is computed from it. The teacher makes each further walk with
more care than the one before it. So checks pay, and their share shows whether training makes a model reason longer.
"""

import re
from collections.abc import Callable
from random import Random
from string import ascii_lowercase


MODULUS = 5
ALPHABET = ascii_lowercase + "01234=: ?A"  # every character of a prompt or an answer
KINDS = ("no chain", "one chain", "a check", "several checks")  # of answers, shortest first
CARE = 1 / 3  # each walk of the teacher slips this many times as often as the walk before it

_PROBLEM = re.compile(r"(?:[a-z][0-4])+=")
_STEP = re.compile(r"[a-z][0-4]:[0-4] ")


def make_problem(rng: Random, min_digits: int = 4, max_digits: int = 7) -> str:
    """Draws a prompt such as `a3b0c4=`.

    Args:
        rng: source of the draws; equal states give equal prompts.
        min_digits: smallest number of digits, at least 1.
        max_digits: largest number of digits, at most 26 (one letter each); every number between is equally likely.

    Raises:
        ValueError: the bounds are not 1 <= min_digits <= max_digits <= 26.
    """
    if not 1 <= min_digits <= max_digits <= len(ascii_lowercase):
        raise ValueError(f"need 1 <= min_digits <= max_digits <= 26, got {min_digits} and {max_digits}")
    keys = ascii_lowercase[: rng.randint(min_digits, max_digits)]
    return "".join(f"{key}{rng.randrange(MODULUS)}" for key in keys) + "="


def correct_answer(prompt: str) -> str:
    """Returns the sum of the prompt's digits modulo 5, as one character.

    Raises:
        ValueError: the prompt does not look like `a3b0c4=`.
    """
    if not _PROBLEM.fullmatch(prompt):
        raise ValueError(f"not a running-sum problem: {prompt!r}; one looks like 'a3b0c4='")
    return str(sum(map(int, prompt[1:-1:2])) % MODULUS)


def worked_answer(rng: Random, prompt: str, max_walks: int, slip: float = 0.0) -> str:
    """Writes the answer of a teacher who makes mistakes but does not know where.

    Args:
        rng: source of the slips and guesses.
        prompt: a problem from `make_problem`.
        max_walks: 0 guesses the digit, 1 answers with the end of a single walk, a larger number walks until two walks
            end in the same digit, at most so many times, and answers with the end of the last one.
        slip: probability per step of the first walk that the running sum is one of the four wrong digits, in [0, 1];
            `CARE` times as large in each further walk.

    Raises:
        ValueError: the prompt is not a problem, max_walks is negative or slip is not a probability.
    """
    correct_answer(prompt)  # refuses what is not a problem
    if max_walks < 0 or not 0.0 <= slip <= 1.0:
        raise ValueError(f"need max_walks >= 0 and slip in [0, 1], got {max_walks} and {slip}")
    if max_walks == 0:
        return f"A:{rng.randrange(MODULUS)}"
    return walked_answer(rng, prompt, max_walks, slip, CARE, "{}{}:{} ".format)


def walked_answer(
    rng: Random, prompt: str, max_walks: int, slip: float, care: float, step: Callable[[str, str, int], str]
) -> str:
    """The answer of `worked_answer` with a walk or more.

    Args:
        care: A further walk slips this many times as often as the walk before it.
        step: (key, digit, running sum) -> how a step is written.
    """
    walks: list[str] = []
    ends: list[int] = []
    while len(walks) < max_walks:
        walk, total = "", 0
        for key, digit in zip(prompt[:-1:2], prompt[1:-1:2], strict=True):
            wrong_by = rng.randrange(1, MODULUS) if rng.random() < slip * care ** len(walks) else 0
            total = (total + int(digit) + wrong_by) % MODULUS
            walk += step(key, digit, total)
        agrees = total in ends
        walks.append(walk)
        ends.append(total)
        if agrees:
            break
    return f"{'?'.join(walks)}A:{ends[-1]}"


def exact_answer(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """The reward function: 1.0 where the text after the last `A:` is the right digit and nothing else, otherwise 0.0.

    How the digit was found does not count. Takes and returns what TRL asks of a reward function; `kwargs` (other data
    columns, the trainer's state) are not read.

    Raises:
        ValueError: a prompt is not a problem. No completion raises.
    """
    return [
        float(predicted_answer(completion) == correct_answer(prompt))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def exact_chain(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """A stricter reward: 1.0 where the last walk is the right chain of sums and the answer is its end, otherwise 0.0.

    A guess earns nothing, so a problem may be never solved. Takes, returns and raises what `exact_answer` does.
    """
    return [
        float(completion.rpartition("?")[2] == worked_answer(Random(), prompt, max_walks=1))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def predicted_answer(completion: str) -> str | None:
    """The text after the last `A:`, whatever it is; `None` where there is no `A:`."""
    _, marker, answer = completion.rpartition("A:")
    return answer if marker else None


def count_checks(completion: str) -> int | None:
    """Counts how often a chain is walked again: the `?` after which at least one step (`a3:3 `) follows at once.

    Returns None where the completion holds no step at all before its first `?`, that is, no chain to check.
    """
    first, *again = completion.split("?")
    if not _STEP.search(first):
        return None
    return sum(_STEP.match(walk) is not None for walk in again)


def kind_of_answer(completion: str) -> str:
    """Puts a completion in one of `KINDS` by the number of its checks: none without a chain, 0, 1, or more."""
    checks = count_checks(completion)
    return KINDS[0] if checks is None else KINDS[1 + min(checks, 2)]
