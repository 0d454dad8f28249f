"""Rewards for programs: the share of its tests that a program passes, each run in a sandbox.

The program is the last fenced block of an answer. A row's tests are JSON, of one of three kinds:

* `{"stdin": [[given, expected], ...]}`: the program reads and prints. Ends of lines and empty lines at the end may
  differ; the program must end by itself, with status 0.
* `{"asserts": [test, ...], "setup": code, "names": [name, ...]}`: each test is Python, and passes where it raises
  nothing. The names are the program's; what else is in the tests is theirs.
* `{"function": name, "calls": [[arguments, accepted], ...]}`: the function, or that method of a class `Solution`,
  gives one of the values accepted. A tuple equals a list.

[`fipo_trl.data.code_problems`] makes them of public data. The program never sees a test: it gets the input and not the
output, or is called from another sandbox, in which the tests are and the comparison is made.
"""

import hashlib
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from fipo_trl.rewards.dapo import text_of
from fipo_trl.rewards.sandbox import Limits, Sandbox, at_once, file_of, piece, sandbox_or_error


LIMITS = Limits()  # of one test
ANSWER_SECONDS = 20  # for all tests of an answer; those that are left then have failed
REMEMBERED = 2**13  # programs, with their tests: the same answer is run once, for both rewards and in all its group

KNOWN: dict[bytes, tuple[bool, ...]] = {}  # results, the oldest first


def code_reward(completions: list, tests: list[str], allow_unsandboxed: bool = False, **kwargs) -> list[float]:
    """The share of its tests that the program of each completion passes, from 0 to 1. Without a program it is 0.

    Programs run at the same time on the cores that there are. Whatever they do, an answer takes 30 s at most.

    Args:
        completions: Texts, or chats: lists of messages of which the last one is scored.
        tests: As many, as this module says.
        allow_unsandboxed: Whether to run programs where they cannot be isolated.
        **kwargs: Other columns of the dataset, unused.

    Raises:
        ValueError: where programs cannot be isolated; if tests are malformed, or not as many as completions.
    """
    return [sum(passed) / len(passed) for passed in results(completions, tests, allow_unsandboxed)]


def code_accuracy(completions: list, tests: list[str], allow_unsandboxed: bool = False, **kwargs) -> list[float]:
    """1.0 where [`code_reward`] is 1: all tests are passed. Else 0.0. Arguments and errors are the same."""
    return [float(all(passed)) for passed in results(completions, tests, allow_unsandboxed)]


def program_of(completion: str | list[dict]) -> str | None:
    """The last fenced block of a completion (``` on lines of their own), or `None`. One that is not closed is none.

    Args:
        completion: A text, or a chat of which the last message is read.
    """
    program: str | None = None
    block: list[str] | None = None
    for line in text_of(completion).splitlines():
        bare = line.strip()
        if block is None:
            if bare.startswith("```") and "`" not in bare[3:]:
                indent, block = line[: len(line) - len(line.lstrip())], []
        elif bare == "```":
            program, block = "\n".join(block) + "\n", None
        else:
            block.append(line.removeprefix(indent))
    return program


def parse_tests(tests: str) -> dict:
    """Tests of a row, checked.

    Raises:
        ValueError: unless they are of one of the kinds above, and at least one.
    """
    try:
        parsed = json.loads(tests)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tests must be a text of JSON, got {tests!r:.80} ({error})") from error
    match parsed:
        case {"stdin": [_, *_] as pairs} if all(is_pair(pair, str, str) for pair in pairs):
            return parsed
        case {"asserts": [_, *_] as asserts, "setup": str() as setup, "names": [_, *_] as names}:
            if all(isinstance(each, str) for each in [*asserts, *names]):
                for source in [setup, *asserts]:
                    compiles(source)
                return parsed
        case {"function": str(), "calls": [_, *_] as calls} if all(is_pair(call, list, list) for call in calls):
            return parsed
    raise ValueError(
        'tests must be {"stdin": [[text, text], ...]}, {"asserts": [code, ...], "setup": code, "names": [name, ...]} '
        'or {"function": name, "calls": [[[argument, ...], [accepted, ...]], ...]}, not without a test; '
        f"got {tests:.80}"
    )


def is_pair(pair, first: type, second: type) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], first) and isinstance(pair[1], second)


def compiles(source: str):
    """Raise a `ValueError` for a test that is no Python."""
    try:
        compile(source, "test", "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the test {source!r:.80} is no Python: {error}") from error


# Running


def results(completions: list, tests: list[str], allow_unsandboxed: bool) -> list[tuple[bool, ...]]:
    """Which tests each completion passes. Errors are those of [`code_reward`]."""
    if len(completions) != len(tests):
        raise ValueError(f"{len(completions)} completions but {len(tests)} tests: give one text for each.")
    sandbox = sandbox_or_error(allow_unsandboxed, LIMITS)
    parsed, jobs, keys = {}, {}, []
    for row, (completion, each) in enumerate(zip(completions, tests, strict=True)):
        if each not in parsed:
            try:
                parsed[each] = parse_tests(each)
            except ValueError as error:
                raise ValueError(f"tests[{row}]: {error}") from error
        program = program_of(completion)
        key = hashlib.sha256(f"{program}\0{each}".encode("utf-8", "surrogatepass")).digest()
        keys.append(key)
        if program is None:
            remember(key, (False,))
        elif key not in KNOWN:
            jobs[key] = (program, parsed[each], sandbox)
    pool = ThreadPoolExecutor(at_once())
    try:
        made = dict(zip(jobs, pool.map(lambda job: outcomes(*job), jobs.values()), strict=True))
    finally:  # at a signal, too, which does not wait for what has not begun
        pool.shutdown(wait=False, cancel_futures=True)
    found = [made[key] if key in made else KNOWN[key] for key in keys]
    for key, passed in made.items():
        remember(key, passed)
    return found


def remember(key: bytes, passed: tuple[bool, ...]):
    """Keep a result, and as many others as are remembered."""
    KNOWN[key] = passed
    while len(KNOWN) > REMEMBERED:
        del KNOWN[next(iter(KNOWN))]


def outcomes(program: str, tests: dict, sandbox: Sandbox) -> tuple[bool, ...]:
    """Which tests a program passes."""
    end = time.monotonic() + ANSWER_SECONDS
    if "stdin" in tests:
        return tuple(
            time.monotonic() < end and prints(program, given, expected, sandbox) for given, expected in tests["stdin"]
        )
    kind = "calls" if "calls" in tests else "asserts"
    passed: list[bool] = []
    while (left := tests[kind][len(passed) :]) and time.monotonic() < end:
        verdicts, waited = ask_for_verdicts(program, tests | {kind: left}, len(left), sandbox, end)
        if not verdicts:  # the program does not even come to its end
            break
        passed += [verdict == ord("1") for verdict in verdicts[1:]]
        # The next one took the program's time, or ended it. It may have had to do with what was left by those before
        if len(verdicts) == 1 or (len(passed) < len(tests[kind]) and waited > sandbox.limits.cpu_seconds / 2):
            passed.append(False)
    return (*passed, *[False] * (len(tests[kind]) - len(passed)))


def prints(program: str, given: str, expected: str, sandbox: Sandbox) -> bool:
    """Whether a program prints what is expected of it."""
    ended = sandbox.run(program, given.encode("utf-8", "replace"))
    return ended.status == 0 and lines_of(ended.output.decode("utf-8", "replace")) == lines_of(expected)


def lines_of(text: str) -> list[str]:
    """The lines of a text without spaces at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def ask_for_verdicts(program: str, tests: dict, number: int, sandbox: Sandbox, end: float) -> tuple[bytes, float]:
    """What `check` of `sandbox_inside.py` writes: "r", then a digit for each test, as far as it comes.

    And how many seconds went by after the last one. It is waited for until `end`, of the monotonic clock.
    """
    ours, theirs = socket.socketpair()
    verdicts, writing = os.pipe()
    with file_of(program.encode("utf-8", "replace")) as source, file_of(json.dumps(tests).encode()) as asked:
        try:
            with (
                sandbox.start("serve", [source.fileno(), ours.fileno()]),
                sandbox.start("check", [asked.fileno(), theirs.fileno(), writing]),
            ):
                for side in (ours, theirs):
                    side.close()
                os.close(writing)
                writing = -1
                said, since = b"", time.monotonic()
                while len(said) <= number:
                    part = piece(verdicts, min(sandbox.limits.seconds, end - time.monotonic()))
                    if not part:
                        break
                    said, since = said + part, time.monotonic()
                return said, time.monotonic() - since
        finally:
            for side in (ours, theirs):
                side.close()
            os.close(verdicts)
            if writing >= 0:
                os.close(writing)
