"""Programs of a model, in the real sandbox: what they may try, and what it brings them.

bubblewrap must be there: on Linux these tests fail without it. `make test` installs it where it may.
"""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path

import pytest

from fipo_trl.evaluation.scoring import answers_beside
from fipo_trl.rewards import code_tests, sandbox
from fipo_trl.rewards.code_tests import code_accuracy, code_reward, parse_tests, program_of
from fipo_trl.rewards.names import columns_read_by, load_reward, load_rewards, name_of, runs_programs
from fipo_trl.rewards.sandbox import Limits, Sandbox


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of what Linux has")


def answer(program):
    return f"A plan.\n\n```python\n{program}\n```\nThat is it."


def score(program, tests, **arguments):
    (reward,) = code_reward([answer(program)], [json.dumps(tests)], **arguments)
    return reward


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A second of CPU time for a test, and each test's own memory of results."""
    monkeypatch.setattr(code_tests, "LIMITS", Limits(cpu_seconds=1, seconds=3.0))
    monkeypatch.setattr(code_tests, "KNOWN", {})


@pytest.fixture
def nothing_is_left(monkeypatch, tmp_path):
    """No process that a program has started, and no file, is there at the end of the test."""
    mark = f"MARK={uuid.uuid4()}"
    monkeypatch.setattr(sandbox, "ENVIRONMENT", sandbox.ENVIRONMENT | dict([mark.split("=")]))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    yield mark
    deadline = time.monotonic() + 10
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []
    assert list((tmp_path / "temporary").iterdir()) == []


def processes_with(mark):
    """Command lines of processes with a variable in their environment, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes())
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def test_the_marks_of_processes_are_seen(nothing_is_left):
    with sandbox.file_of(b"input()") as program:
        reading, writing = os.pipe()
        with Sandbox().start("run", [program.fileno()], stdin=reading):
            deadline = time.monotonic() + 10
            while (
                len(processes_with(nothing_is_left)) < 2 and time.monotonic() < deadline
            ):  # of bubblewrap, and Python
                time.sleep(0.02)
            assert len(processes_with(nothing_is_left)) >= 2
        os.close(reading)
        os.close(writing)


# Scripts, which shall print the square of their input. Whether one may get its point, and what it does

SQUARE = {"stdin": [["7\n", "49\n"]]}
PRINT = "print(int(input()) ** 2)\n"
SCRIPTS = {
    "right": (1, PRINT),
    "wrong": (0, "print(48)"),
    "prints more": (0, PRINT + "print()\nprint(1)"),
    "spaces and lines at the end": (1, PRINT + "print('  ')\nprint()"),
    "exits with 0": (1, PRINT + "import sys; sys.exit(0)"),
    "exits with 0 and has printed nothing": (0, "import sys; sys.exit(0)"),
    "exits with 1": (0, PRINT + "import sys; sys.exit(1)"),
    "raises": (0, PRINT + "1 / 0"),
    "crashes": (0, PRINT + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
    "no Python": (0, "print("),
    "null bytes": (0, "print(49)\0"),
    "main only": (1, f"if __name__ == '__main__':\n    {PRINT}"),
    "own module": (
        1,
        f"import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: int\n{PRINT}pickle.dumps(A(1))",
    ),
    "fork bomb": (0, "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"),
    "a daemon": (
        1,
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n"
        "    os._exit(0)\nos.wait()\n" + PRINT,
    ),
    "endless loop": (0, "while True:\n    pass"),
    "sleeps": (0, PRINT + "import time; time.sleep(1000)"),
    "closes its output and sleeps": (
        0,
        PRINT + "import os, time; os.sys.stdout.flush(); os.close(1); time.sleep(1000)",
    ),
    "more output than is read": (0, PRINT + "print('\\n' * 10**7)"),
    "gigabytes of output": (0, "while True:\n    print('x' * 10**6)"),
    "gigabytes of files": (
        1,
        "try:\n    for i in range(3000):\n        open(f'/tmp/{i}', 'wb').write(bytes(10**6))\n"
        "except OSError:\n    " + PRINT,
    ),
    "one large file": (
        0,
        "with open('/tmp/a', 'wb') as file:\n    for _ in range(3000):\n        file.write(bytes(10**6))\n" + PRINT,
    ),
    "memory at once": (0, "x = bytearray(10**10)\n" + PRINT),
    "memory bit by bit": (0, "x = []\nwhile True:\n    x.append(bytes(10**7))"),
    "memory of the system": (1, "import ctypes\nassert ctypes.CDLL(None).shmget(0, 10**9, 0o1600) == -1\n" + PRINT),
    "a new namespace": (1, "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == -1\n" + PRINT),
    "kills its parent": (
        1,
        "import os\nfor pid in (os.getppid(), 1):\n    try:\n        os.kill(pid, 9)\n"
        "    except OSError:\n        pass\n" + PRINT,
    ),
    "kills all": (0, "import os, signal\nos.kill(-1, 9)\nos.kill(0, 9)"),
    "signal handlers": (
        0,
        "import signal\nfor number in range(1, 65):\n    try:\n"
        "        signal.signal(number, lambda *_: None)\n    except (OSError, ValueError):\n        pass\n"
        "while True:\n    pass",
    ),
    "raises its limits": (
        0,
        "import resource\nfor name in ('CPU', 'AS', 'NPROC'):\n    try:\n"
        "        resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (-1, -1))\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
    ),
    "threads that do not end": (
        0,
        "import threading\ndef f():\n    while True:\n        pass\n"
        "for _ in range(1000):\n    threading.Thread(target=f).start()",
    ),
    "a thread with a large stack": (
        1,
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
        f"def f():\n    {PRINT}thread = threading.Thread(target=f)\nthread.start()\nthread.join()",
    ),
    "no rights": (
        1,
        "import os\nassert os.getuid() != 0\nfor path in ('/', '/usr/bin', '/dev', '/proc/sys/kernel', '/etc'):\n"
        "    try:\n        open(path + '/x', 'w')\n    except OSError:\n        continue\n    raise SystemExit(1)\n"
        + PRINT,
    ),
    "no variables": (
        1,
        "import os\nassert 'PATH' in os.environ\nassert not {'HF_TOKEN', 'PYTHONPATH', 'USER'} & set(os.environ)\n"
        + PRINT,
    ),
    "other processes": (1, "import os\nassert sum(name.isdigit() for name in os.listdir('/proc')) == 2\n" + PRINT),
}


@pytest.mark.parametrize("names", [list(SCRIPTS)[:16], list(SCRIPTS)[16:]], ids=["first", "second"])
def test_scripts(names, nothing_is_left, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    start = time.monotonic()
    rewards = code_reward([answer(SCRIPTS[name][1]) for name in names], [json.dumps(SQUARE)] * len(names))
    assert dict(zip(names, rewards, strict=True)) == {name: float(SCRIPTS[name][0]) for name in names}
    assert time.monotonic() - start < 60


def test_files_and_the_network_are_out_of_reach(tmp_path, nothing_is_left):
    canary = tmp_path / "canary"
    canary.write_text("here")
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    tries = f"""
import os, shutil, socket, subprocess
for path in ("{canary}", "{tmp_path}", os.path.expanduser("~"), "/home", "/tmp", "/dev"):
    shutil.rmtree(path, ignore_errors=True)
    try:
        os.remove(path)
    except OSError:
        pass
for address in (("127.0.0.1", {server.getsockname()[1]}), ("1.1.1.1", 53)):
    try:
        socket.create_connection(address, timeout=1)
    except OSError:
        continue
    raise SystemExit(1)
"""
    assert score(tries + PRINT, SQUARE) == 1
    assert canary.read_text() == "here"
    with pytest.raises(TimeoutError):
        server.accept()


@pytest.mark.slow
def test_the_expected_output_is_nowhere(nothing_is_left, monkeypatch):
    """A program looks for it in every file that it can read, in its memory and in the sandbox's own frames."""
    monkeypatch.setattr(code_tests, "LIMITS", Limits(cpu_seconds=20, seconds=60.0))
    monkeypatch.setattr(code_tests, "ANSWER_SECONDS", 120)
    secret = uuid.uuid4().hex
    looks = """
import gc, os, sys
seen, mark = set(), "xjzq"[::-1]
def look(text):
    for part in (text if isinstance(text, str) else text.decode("latin-1")).split(mark)[1:]:
        seen.add(part[:32]) if part[:1].isalnum() else None
for folder in ("/proc/self", "/proc/1", "/proc/2", "/tmp", "/dev", "/home", "/var", "/run"):
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            try:
                if os.path.isfile(path) and not path.startswith("/proc/kcore"):
                    with open(path, "rb") as file:
                        look(file.read(10**6))
            except Exception:
                pass
for thing in gc.get_objects():
    if isinstance(thing, (dict, list, tuple)) and thing is not seen:
        for part in thing.values() if isinstance(thing, dict) else thing:
            if isinstance(part, (str, bytes)):
                look(part)
frame = sys._getframe()
while frame:
    for part in frame.f_locals.values():
        if isinstance(part, (str, bytes)):
            look(part)
    frame = frame.f_back
for descriptor in range(3, 64):
    try:
        look(os.pread(descriptor, 10**6, 0))
    except OSError:
        pass
print(mark + seen.pop() if seen else "nothing")
"""
    assert score(looks, {"stdin": [["7\n", f"qzjx{secret}\n"], ["7\n", "nothing\n"]]}) == 0.5
    called = (
        "def f(x):\n    " + looks.replace("\n", "\n    ") + "\n    return mark + seen.pop() if seen else 'nothing'"
    )
    tests = {"asserts": [f"assert f(1) == 'qzjx{secret}'", "assert f(2) == 'nothing'"], "setup": "", "names": ["f"]}
    assert score(called, tests) == 0.5


# Assertions, of a function that squares

ASSERTS = {"asserts": ["assert f(2) == 4", "assert f(3) == 9"], "setup": "import math", "names": ["f"]}
FUNCTIONS = {
    "right": (1, "def f(x):\n    return x * x"),
    "half right": (0.5, "def f(x):\n    return 4"),
    "half right, ends": (0.5, "import os\ndef f(x):\n    return 4 if x == 2 else os._exit(0)"),
    "half right, ends before": (0.5, "import os\ndef f(x):\n    return 9 if x == 3 else os._exit(0)"),
    "half right, hangs": (0.5, "def f(x):\n    while x == 3:\n        pass\n    return 4"),
    "runs only if it is a script": (1, "def f(x):\n    return x * x\nif __name__ == '__main__':\n    exit(1)"),
    "prints": (1, "def f(x):\n    print('0' * 10**6)\n    return x * x"),
    "none": (0, "def g(x):\n    return x * x"),
    "no Python": (0, "def f("),
    "exits": (0, "import sys\nsys.exit(0)"),
    "exits at once": (0, "import os\nos._exit(0)"),
    "exits when called": (0, "def f(x):\n    raise SystemExit(0)"),
    "kills all": (0, "import os\ndef f(x):\n    os.kill(-1, 9)\n    os.kill(1, 9)"),
    "hangs": (0, "while True:\n    pass"),
    "equal to all": (0, "class A:\n    def __eq__(self, other):\n        return True\n    __hash__ = object.__hash__\n"
                        "def f(x):\n    return A()"),
    "a number equal to all": (0, "class A(int):\n    def __eq__(self, other):\n        return True\n"
                                 "    __hash__ = int.__hash__\ndef f(x):\n    return A(5)"),
    "redefines": (0, "import builtins, operator, json\nbuiltins.AssertionError = ValueError\n"
                     "builtins.__import__ = lambda *_: None\nbuiltins.compile = lambda *_: ''\n"
                     "builtins.exec = lambda *_: None\njson.dumps = lambda value: '1'\ndef f(x):\n    return 0"),
    "rewrites the sandbox": (0, "import sys\nmain = sys.modules['__main__']\nmain.encode = lambda *_: True\n"
                                "main.check = main.serve = main.plain = lambda *_: True\ndef f(x):\n    return 0"),
    "prints verdicts": (0, "import os\nfor n in range(64):\n    for said in (b'r', b'11', b'r11\\n', b'[1]\\n'):\n"
                           "        try:\n            os.write(n, said)\n        except OSError:\n            pass\n"
                           "def f(x):\n    return 0"),
    "raises what a test might expect": (0, "def f(x):\n    raise AssertionError"),
    "endless": (0, "import itertools\ndef f(x):\n    return itertools.count()"),
    "in itself": (0, "def f(x):\n    x = []\n    x.append(x)\n    return x"),
    "deep": (0, "def f(x):\n    x = []\n    for _ in range(10**5):\n        x = [x]\n    return x"),
    "large": (0, "def f(x):\n    return 'x' * 10**8"),
}  # fmt: skip


def test_functions(nothing_is_left):
    programs = [answer(program) for _, program in FUNCTIONS.values()]
    start = time.monotonic()
    rewards = code_reward(programs, [json.dumps(ASSERTS)] * len(programs))
    assert dict(zip(FUNCTIONS, rewards, strict=True)) == {
        name: float(reward) for name, (reward, _) in FUNCTIONS.items()
    }
    assert time.monotonic() - start < 60
    calls = json.dumps({"function": "f", "calls": [[[2], [4, [4]]], [[3], [9]]]})
    rewards = code_reward(programs, [calls] * len(programs))
    assert dict(zip(FUNCTIONS, rewards, strict=True)) == {
        name: float(reward) for name, (reward, _) in FUNCTIONS.items()
    }


def test_a_bare_except_does_not_save_a_program_that_ends():
    test = "try:\n    f(1)\nexcept:\n    pass\nelse:\n    assert False"
    tests = {"asserts": [test], "setup": "", "names": ["f"]}
    assert score("def f(x):\n    raise ValueError", tests) == 1
    assert score("import os\ndef f(x):\n    os._exit(0)", tests) == 0


@pytest.mark.parametrize(
    ("returned", "expected", "equal"),
    [
        ("[1, (2, {3})]", "[1, (2, {3})]", True),
        ("[1, 2]", "(1, 2)", False),
        ("10**5000", "10**5000", True),
        ("-2**63", "-2**63", True),
        ("True", "True", True),
        ("'\\ud800é'", "'\\ud800é'", True),
        ("b'\\xff'", "b'\\xff'", True),
        ("1 + 2j", "1 + 2j", True),
        ("float('inf')", "float('inf')", True),
        ("0.1 + 0.2", "0.3", False),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}", True),
        ("frozenset({1})", "{1}", True),
        ("{(1, 2): [None]}", "{(1, 2): [None]}", True),
        ("object()", "object()", False),
        ("type('A', (list,), {'__eq__': lambda *_: True})([1])", "[2]", False),
    ],
)
def test_values(returned, expected, equal):
    tests = {"asserts": [f"assert f() == {expected}"], "setup": "", "names": ["f"]}
    assert score(f"def f():\n    return {returned}", tests) == equal


def test_objects_of_classes_of_the_program():
    program = """
import enum
class Node:
    def __init__(self, value):
        self.value, self.left = value, None
    def double(self):
        return Node(2 * self.value)
def depth(node):
    return 1 + depth(node.left) if node else 0
class Stack:
    def __init__(self, items):
        self.items = items
    def __len__(self):
        return len(self.items)
    def __iter__(self):
        return iter(self.items)
    def __getitem__(self, index):
        return self.items[index]
    def __eq__(self, other):
        return self.items == other.items
    def __str__(self):
        return "stack"
    def pop(self):
        return self.items.pop()
    def __add__(self, other):
        return other
LIMIT = 10
"""
    asserts = [
        "assert depth(root) == 2 and root.left.double().value == 4",
        "s = Stack([1, 2])\nassert len(s) == 2 and list(s) == [1, 2] and s[1] == 2 and str(s) == 'stack' and s",
        "s = Stack([1, 2])\nassert s.pop() == 2 and len(s) == 1",
        "assert Stack([1]) == Stack([1]) and Stack([1]) != Stack([2])",
        "assert LIMIT == 10 and math.sqrt(LIMIT * LIMIT) == 10",
        "assert Stack([1]) == [1]",  # what is the program's own is equal to nothing that is expected
        "assert Stack([]) + 5 == 5",
        "assert Missing() == 1",
        "assert depth(object()) == 1",  # an object that the program cannot be given
    ]
    setup = "import math\nroot = Node(1)\nroot.left = Node(2)"
    tests = {"asserts": asserts, "setup": setup, "names": ["Node", "depth", "Stack", "LIMIT", "Missing"]}
    assert code_tests.outcomes(program, tests, Sandbox()) == (True,) * 5 + (False,) * 4


def test_a_name_of_python_is_not_the_programs_unless_it_is_said():
    program = "def sorted(x):\n    return [1, 2]\ndef f():\n    return [2, 1]"
    tests = {"asserts": ["assert sorted(f()) == [1, 2]", "assert sorted([3]) == [3]"], "setup": "", "names": ["f"]}
    assert score(program, tests) == 1
    assert score(program, tests | {"names": ["f", "sorted"]}) == 0.5


def test_a_program_cannot_answer_for_names_that_are_not_its_own():
    """It answers by itself, in place of the sandbox, and says that it has Python's functions, too."""
    program = """
import os, socket
for number in range(3, 64):
    try:
        channel = socket.socket(fileno=number)
        break
    except OSError:
        pass
names = '["value", ["dict", ["f", ["kept", 0]], ["set", ["kept", 0]], ["abs", ["kept", 0]], ["math", ["kept", 0]]]]\\n'
file = channel.makefile("rw")
for line in file:
    file.write(names if '"names"' in line else '["value", 0]\\n')
    file.flush()
"""
    asserts = ["assert set(f(1)) == set((1,))", "assert abs(f(1) - 3) < 0.1", "assert math.prod((f(1), 2)) == 2"]
    tests = {"asserts": [*asserts, "assert f(1) == 0"], "setup": "import math", "names": ["f"]}
    assert code_tests.outcomes(program, tests, Sandbox()) == (False, False, False, True)


def test_a_method_of_a_solution():
    tests = {"function": "twoSum", "calls": [[[[2, 7], 9], [[0, 1]]]]}
    assert score("class Solution:\n    def twoSum(self, numbers, target):\n        return 0, 1", tests) == 1
    assert score("class Solution:\n    def threeSum(self, numbers, target):\n        return 0, 1", tests) == 0


# The reward


def test_the_share_of_tests_and_all_of_them():
    tests = json.dumps({"stdin": [["1", "1"], ["2", "4"], ["3", "9"], ["4", "4"]]})
    chat = [{"role": "assistant", "content": answer("print(input())")}]
    completions = [answer("print(input())"), chat, answer("n = int(input())\nprint(n if n in (1, 4) else n * n)"), ""]
    assert code_reward(completions, [tests] * 4, solution=["a"] * 4) == [0.5, 0.5, 1.0, 0.0]
    assert code_accuracy(completions, [tests] * 4) == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```\n```py\nb\nc\n```\nend", "b\nc\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("1. so:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("<think>```python\na\n```</think>", None),
        ("`a` ```b```", None),
        ("```python\n```", "\n"),
        ("a", None),
        ("", None),
        ([], None),
        ([{"role": "assistant", "content": None}], None),
        ("```x\n" * 100_000, None),
    ],
)
def test_the_last_fenced_block_is_the_program(text, program):
    start = time.monotonic()
    assert program_of(text) == program
    assert time.monotonic() - start < 1


@pytest.mark.slow
def test_an_answer_has_an_end_however_many_tests_there_are(monkeypatch):
    monkeypatch.setattr(code_tests, "ANSWER_SECONDS", 1)
    tests = {"stdin": [["1", "1"]] + [["", ""]] * 100}
    start = time.monotonic()
    assert score("import time\nprint(input())\ntime.sleep(0.6)", tests) == pytest.approx(1 / 101)
    assert time.monotonic() - start < 10
    asserts = {"asserts": ["assert f() == 1"] * 100, "setup": "", "names": ["f"]}
    for ending in ("while True:\n        pass", "import time; time.sleep(0.4)\n    return 1"):
        start = time.monotonic()
        assert score(f"def f():\n    {ending}", asserts) < 0.1
        assert time.monotonic() - start < 15


def test_the_same_program_is_run_once(monkeypatch):
    runs = []
    monkeypatch.setattr(code_tests, "outcomes", lambda program, *_: runs.append(program) or (True,))
    monkeypatch.setattr(code_tests, "REMEMBERED", 3)
    tests = json.dumps(SQUARE)
    programs = [answer(number) for number in (1, 2, 1)]
    assert code_reward(programs, [tests] * 3) == code_accuracy(programs, [tests] * 3) == [1.0] * 3
    assert len(runs) == 2
    code_reward([answer(1)], [json.dumps({"stdin": [["7", "50"]]})])
    assert len(runs) == 3
    code_reward([answer(number) for number in (3, 4, 5)], [tests] * 3)
    assert len(code_tests.KNOWN) == 3
    code_reward([answer(1)], [tests])
    assert len(runs) == 7


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, r"tests\[1\]: tests must be a text of JSON, got None"),
        ("{", "must be a text of JSON"),
        ("[]", "not without a test"),
        ({"stdin": []}, "not without a test"),
        ({"stdin": [["a"]]}, "must be"),
        ({"stdin": [["a", 1]]}, "must be"),
        ({"asserts": ["assert f("], "setup": "", "names": ["f"]}, r"the test 'assert f\(' is no Python"),
        ({"asserts": ["assert f()"], "setup": ")", "names": ["f"]}, r"the test '\)' is no Python"),
        ({"asserts": ["assert f()"], "setup": "", "names": []}, "must be"),
        ({"function": "f", "calls": [[1, 2]]}, "must be"),
    ],
)
def test_malformed_tests(tests, message):
    tests = json.dumps(tests) if isinstance(tests, dict) else tests
    with pytest.raises(ValueError, match=message):
        code_reward([answer(""), ""], [json.dumps(SQUARE), tests])


def test_as_many_tests_as_completions():
    with pytest.raises(ValueError, match="2 completions but 1 tests"):
        code_reward(["a", "b"], [json.dumps(SQUARE)])
    assert parse_tests(json.dumps(SQUARE)) == SQUARE


def test_programs_run_at_the_same_time_and_share_the_cores_with_other_processes(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert sandbox.at_once() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sandbox.at_once() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert sandbox.at_once() == 1
    monkeypatch.setattr(code_tests, "at_once", lambda: 8)
    programs = [answer(f"import time\ntime.sleep(1)\nprint(49, {number})") for number in range(8)]
    start = time.monotonic()
    code_reward(programs, [json.dumps(SQUARE)] * 8)
    assert time.monotonic() - start < 6


# As another user than root, whose sandbox is made in another way

SYSTEM_PYTHON = "/usr/bin/python3"  # that of the tests may lie in root's home
AS_A_USER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sandbox", sys.argv[1] + "/sandbox.py")
sandbox = sys.modules["sandbox"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
print(sandbox.isolation_problem())
made = sandbox.Sandbox(limits=sandbox.Limits(cpu_seconds=1, seconds=3.0))
print(made.run("import os; print(os.getuid() == 0, os.path.exists(" + repr(sys.argv[1] + "/canary") + "))"))
print(made.run("import os\\nwhile True:\\n    try:\\n        os.fork()\\n    except OSError:\\n        pass").status)
print(made.run("import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))").output)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="all tests run as such a user")
@pytest.mark.skipif(not os.path.exists(SYSTEM_PYTHON), reason="there is no Python that another user can read")
def test_as_another_user(nothing_is_left):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o755)
        (folder / "canary").touch()
        for source in (sandbox.__file__, sandbox.INSIDE):
            shutil.copy(source, folder)
        command = [SYSTEM_PYTHON, "-c", AS_A_USER, str(folder)]
        run = subprocess.run(
            command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, cwd="/"
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines() == [
            "None",
            r"Ended(output=b'False False\n', status=0)",
            "None",
            r"b'-1\n'",
        ]
    finally:
        shutil.rmtree(folder)


# Where there is no sandbox


def stand_in(folder, monkeypatch, script):
    """A program called bwrap, found before the real one."""
    (folder / "bwrap").write_text(f"#!{sys.executable}\nimport os, sys\n{script}\n")
    (folder / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return sandbox.isolation_problem.__wrapped__()


def test_the_probe_finds_a_sandbox():
    assert sandbox.isolation_problem.__wrapped__() is None


def test_the_probe_finds_a_sandbox_that_is_none(tmp_path, monkeypatch, nothing_is_left):
    starts = "command = sys.argv[sys.argv.index('--') + 1 :]\ncommand[command.index('run') + 1] = '-1'\n"
    problem = stand_in(tmp_path, monkeypatch, starts + "os.execv(command[0], command)")
    assert "a program can read files outside" in problem
    assert "a program can reach the network" in problem


def test_the_probe_says_what_bubblewrap_said(tmp_path, monkeypatch):
    refused = "bwrap: setting up uid map: Permission denied"
    assert stand_in(tmp_path, monkeypatch, f"sys.exit('{refused}')") == refused
    assert "without a word" in stand_in(tmp_path, monkeypatch, "sys.exit(1)")


def test_the_probe_misses_bubblewrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "bubblewrap is not installed" in sandbox.isolation_problem.__wrapped__()
    monkeypatch.setattr("sys.platform", "darwin")
    assert "this is darwin" in sandbox.isolation_problem.__wrapped__()


@pytest.fixture
def no_sandbox(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation_problem", lambda: "bubblewrap is not installed")
    sandbox.warn_of.cache_clear()


def test_without_a_sandbox_no_program_runs(no_sandbox):
    with pytest.raises(
        ValueError, match=r"cannot be isolated here: bubblewrap .* apt-get install .* allow_unsandboxed"
    ):
        score(PRINT, SQUARE)
    with pytest.raises(ValueError, match="cannot be isolated"):
        code_reward([""], [json.dumps(SQUARE)])  # at the start, though there is no program


@pytest.mark.slow
def test_unless_it_is_allowed(no_sandbox, nothing_is_left, caplog):
    programs = [PRINT, "while True:\n    pass", "x = bytearray(10**10)", "import time\ntime.sleep(1000)"]
    programs += ["print('x' * 10**9)", "open('a', 'w').write('x')\n" + PRINT]
    rewards = code_reward([answer(each) for each in programs], [json.dumps(SQUARE)] * 6, allow_unsandboxed=True)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert score(FUNCTIONS["half right"][1], ASSERTS, allow_unsandboxed=True) == 0.5
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("PROGRAMS OF THE MODEL RUN WITHOUT A SANDBOX")


def test_what_a_recipe_gives_to_the_reward():
    code, dapo = load_rewards(["code_reward", "dapo_reward"], 10, allow_unsandboxed=True)
    assert isinstance(code, partial)
    assert code.keywords == {"allow_unsandboxed": True}
    assert pickle.loads(pickle.dumps(code)).func is code_reward  # for a process of its own
    assert name_of(code) == "code_reward"
    assert columns_read_by([code, dapo]) == ["tests", "solution"]
    assert [runs_programs(each) for each in (code, dapo, "a/model")] == [True, False, False]
    assert load_reward("fipo_trl.rewards.code_accuracy") is code_accuracy
    assert answers_beside(code) is None
