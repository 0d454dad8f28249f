"""reasoning-gym in a Python process of its own, which makes its problems and scores answers to them.

What it scores was written by a model that is rewarded for it, and some of its scorers evaluate the answer as Python
(`EVALUATED`), take hours over `9**9**9`, or raise. Here an answer that is code is not evaluated, and a scorer that
takes too long or too much memory ends its own process, not the training. Some of its tasks go through sets of strings:
with `PYTHONHASHSEED=0` they make the same problems on every rank and in every run.

The process as a whole is in the sandbox of [`fipo_trl.rewards.sandbox`] wherever there is one: a sandbox for each
answer would import reasoning-gym and sympy for each, which takes a second. That is why code is not evaluated in there
either: it could make all later answers right.

This file is the module to import, [`ask`], and the program of that process, which imports no other file of this
package.
"""

import ast
import contextlib
import functools
import importlib.util
import json
import os
import random
import resource
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable


SECONDS = {"make": 120, "score": 2}  # of CPU time
MEMORY = 4 * 2**30  # bytes
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Tasks whose scorers hand the answer to Python's eval, and to eval through sympy; what the latter may call
EVALUATED = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
PARSED_BY_SYMPY = {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24"}
PARSED_BY_SYMPY |= {"simple_integration"}
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
FUNCTIONS |= {"asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs"}
ARITHMETIC: tuple[type[ast.AST], ...] = (ast.Expression, ast.Constant, ast.Name, ast.expr_context, ast.List, ast.Tuple)
ARITHMETIC += (ast.UnaryOp, ast.BinOp, ast.unaryop, ast.operator)


# The module: asks


def ask(kind: str, *arguments):
    """What [`make`] or [`score`] gives in the other process, which is started when there is none.

    Raises:
        RuntimeError: if it raised there, or the process ended over it.
    """
    process = process_of(os.getpid())
    if process.poll() is not None:  # it was killed since the last request
        process_of.cache_clear()
        process = process_of(os.getpid())
    assert process.stdin is not None  # both are pipes, see below
    assert process.stdout is not None
    process.stdin.write(json.dumps([kind, *arguments]) + "\n")
    process.stdin.flush()
    reply = process.stdout.readline()
    if not reply:
        process_of.cache_clear()
        ended = process.wait()
        too_long = ended in (-signal.SIGPROF, 128 + signal.SIGPROF)  # bubblewrap says it as shells do
        over = f"more than {SECONDS[kind]} s" if too_long else f"the process ended with status {ended}"
        raise RuntimeError(over)
    reply = json.loads(reply)
    if "error" in reply:
        raise RuntimeError(reply["error"])
    return reply["value"]


@functools.cache
def process_of(pid: int) -> subprocess.Popen:
    """The other process of a process (a forked one needs its own). It ends with the pipe from which it reads."""
    from fipo_trl.rewards.sandbox import Limits, Sandbox, isolation_problem, rules_for_system_calls  # see above

    command, environment = [sys.executable, "-P", __file__], os.environ | ENVIRONMENT
    with rules_for_system_calls() as filters:
        if isolation_problem() is None:
            sandbox = Sandbox(limits=Limits(cpu_seconds=10**6, memory=MEMORY, files=256))
            readable = [sys.prefix, os.path.realpath(sys.prefix), os.path.abspath(__file__), *packages()]
            command = sandbox.command("start", command, filters, readable=readable, end_with_parent=False)
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            pass_fds=filters,
            start_new_session=True,  # Ctrl-C is for the trainer, which goes on to the end of its update
        )


def packages() -> list[str]:
    """Folders in which reasoning-gym and what it imports are, wherever they were installed."""
    found = importlib.util.find_spec("reasoning_gym")
    beside = [] if found is None or found.origin is None else [os.path.dirname(os.path.dirname(found.origin))]
    return [*beside, *site.getsitepackages()]


# The program: answers


@functools.cache
def dataset_of(task: str, settings: str):
    """The `ProceduralDataset` of a task with its settings, as JSON."""
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(settings))


@functools.cache
def entry_of(problem: str) -> tuple:
    """The dataset that a problem is of, and its entry: `question`, `answer` and `metadata`."""
    fields = json.loads(problem)
    dataset = dataset_of(fields["task"], json.dumps(fields["settings"]))
    random.seed(problem)  # list_functions draws from the global generator, too
    return dataset, dataset[fields["index"]]


def make(problem: str) -> tuple[str, str]:
    """The question of a problem and its answer as text, empty where there is no single one.

    Args:
        problem: JSON with `task`, its `settings`, reasoning-gym's `seed` and `size` included, and `index`.
    """
    _, entry = entry_of(problem)
    return entry["question"], "" if entry["answer"] is None else str(entry["answer"])


def score(problem: str, answer: str) -> float:
    """What the task's scorer gives; 0.0 for an answer that it would have to run as code."""
    task = json.loads(problem)["task"]
    if task in EVALUATED | PARSED_BY_SYMPY and is_code(answer, task):
        return 0.0
    dataset, entry = entry_of(problem)
    return float(dataset.score_answer(answer, entry))


def is_code(answer: str, task: str) -> bool:
    """Whether to evaluate an answer is more than arithmetic with numbers, symbols and lists."""
    by_sympy = task in PARSED_BY_SYMPY
    try:
        nodes = list(ast.walk(ast.parse(answer.strip(), mode="eval")))
    except Exception:
        return by_sympy and answer != ""  # sympy would rewrite it into Python; eval will raise as this did
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    return (
        not all(isinstance(node, (*ARITHMETIC, ast.Call)) for node in nodes)
        or not all(by_sympy and isinstance(called, ast.Name) and called.id in FUNCTIONS for called in calls)
        or any(by_sympy and isinstance(node, ast.Constant) and isinstance(node.value, str) for node in nodes)
    )


def serve():
    """Reply to each line on standard input with one on standard output, both JSON."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a task prints must not pass for a reply
    with contextlib.suppress(ValueError, OSError):  # macOS sets no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replying: dict[str, Callable] = {"make": make, "score": score}
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS[kind])  # then the kernel ends this process
        try:
            reply = {"value": replying[kind](*arguments)}
        except BaseException as error:  # SystemExit, too
            reply = {"error": f"{type(error).__name__}: {error!s:.200}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # codeio's programs write files
        serve()
