"""What runs in the sandbox: it gives up rights, then runs a program, answers calls of its functions, or tests them.

[`fipo_trl.rewards.sandbox`] starts this file by its path, in one of three parts:

* `run`: the program is a script, between standard input and standard output;
* `serve`: the program is imported, and its functions are called for who asks through a socket;
* `check`: tests are run, whose calls go through that socket.

The last two are two sandboxes. What the tests expect is in the second one only, and there the comparison is made. The
program can answer calls, and do no more: whatever it redefines, prints, raises or kills, no test passes for it.

Only the standard library is imported, and little of it: each program of a model pays for this start.
"""

import builtins
import os
import resource
import sys


# First, in every part


def give_up_rights(user: int, limits: dict[str, int]):
    """Become a user without rights, within limits that cannot be raised again.

    Args:
        user: Number of the user to become, or -1 to remain who one is.
        limits: By the names of `resource`, without `RLIMIT_`.
    """
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if user >= 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # where memory runs out, this ends, not the training
            file.write("1000")
    except OSError:
        pass


def contents(descriptor: int) -> bytes:
    """All that an open file holds, which is then closed."""
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


def module(name: str):
    """A new module, where a program finds itself."""
    made = type(sys)(name)
    made.__dict__["__builtins__"] = builtins
    sys.modules[name] = made
    return made


# run


def run(source: bytes):
    """Run a program as a script."""
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), module("__main__").__dict__)


# Values, between two processes


def encode(value, kept: list):
    """A value as JSON can hold it. What is no plain data is kept here, and its number sent.

    Subclasses become what they are made of, so that none brings an `__eq__` of its own along.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        value = int(value)
        return value if abs(value) < 2**62 else ["int", hex(value)]  # Python limits decimal digits, not others
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return ["list", *(encode(each, kept) for each in value)]
    if isinstance(value, tuple):
        return ["tuple", *(encode(each, kept) for each in value)]
    if isinstance(value, set):
        return ["set", *(encode(each, kept) for each in value)]
    if isinstance(value, frozenset):
        return ["frozenset", *(encode(each, kept) for each in value)]
    if isinstance(value, dict):
        return ["dict", *([encode(key, kept), encode(each, kept)] for key, each in value.items())]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, Remote):
        return ["kept", value._number]
    kept.append(value)
    return ["kept", len(kept) - 1]


def decode(value, resolve):
    """The value that [`encode`] encoded; `resolve` gives that of a number."""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("no value")
        return value
    kind, *rest = value
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)([decode(each, resolve) for each in rest])
    if kind == "dict":
        return {decode(key, resolve): decode(each, resolve) for key, each in rest}
    if kind == "int":
        return int(rest[0], 16)
    if kind == "bytes":
        return bytes.fromhex(rest[0])
    if kind == "complex":
        return complex(*rest)
    if kind == "kept":
        return resolve(rest[0])
    raise ValueError("no value")


# serve


def serve(source: bytes, channel: int):
    """Import a program and answer, line by line: what its names are, and what its objects do."""
    import json

    requests, replies = os.fdopen(channel, "r"), os.fdopen(os.dup(channel), "w")
    kept: list = []
    program = module("program")  # `if __name__ == "__main__"` is for scripts
    failure = None
    try:
        exec(compile(source, "program.py", "exec"), program.__dict__)
    except BaseException as error:
        failure = error
    actions: dict = {
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "get": getattr,
        "set": setattr,
        "len": len,
        "iter": list,
        "bool": bool,
        "str": str,
        "getitem": lambda of, key: of[key],
        "setitem": lambda of, key, value: of.__setitem__(key, value),
        "eq": lambda one, other: bool(one == other),
    }
    for line in requests:
        try:
            if failure is not None:
                raise failure
            kind, *arguments = json.loads(line)
            if kind == "names":
                have = program.__dict__
                value = ["dict", *([name, encode(have[name], kept)] for name in arguments if name in have)]
            else:
                decoded = [decode(each, kept.__getitem__) for each in arguments]
                value = encode(actions[kind](*decoded), kept)
            reply = json.dumps(["value", value])
        except BaseException as error:  # SystemExit, too
            reply = json.dumps(["error", type(error).__name__, str(error)[:200]])
        replies.write(reply + "\n")
        replies.flush()


# check

LONGEST_REPLY = 2**25  # bytes


class Gone(BaseException):
    """The program has ended, or says what is no reply. (No test catches this as an `Exception`.)"""


class Remote:
    """An object of the program that is no plain data: a function, or an instance of a class of its own.

    What is done to it happens there; it is never equal to plain data, nor smaller, nor part of a sum. (Else the
    program could make objects that agree with whatever is expected.)
    """

    def __init__(self, number: int, ask):
        self.__dict__.update(_number=number, _ask=ask)

    def __call__(self, *args, **kwargs):
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __setattr__(self, name, value):
        self._ask("set", self, name, value)

    def __len__(self):
        return self._ask("len", self)

    def __iter__(self):
        return iter(self._ask("iter", self))

    def __bool__(self):
        return self._ask("bool", self)

    def __str__(self):
        return self._ask("str", self)

    def __getitem__(self, key):
        return self._ask("getitem", self, key)

    def __setitem__(self, key, value):
        self._ask("setitem", self, key, value)

    def __eq__(self, other):
        return self._ask("eq", self, other) if isinstance(other, Remote) else NotImplemented

    __hash__ = object.__hash__


def check(tests: dict, channel: int, verdicts: int):
    """Run tests, and write for each "1" (passed) or "0" as soon as it is known, after an "r" once the program answers.

    Args:
        tests: `asserts` with their `setup` and the `names` that are the program's; or `function` and its `calls`.
    """
    import json

    writer, reader = os.fdopen(channel, "w"), os.fdopen(os.dup(channel), "rb")
    gone = False

    def exchange(kind: str, *arguments):
        nonlocal gone
        try:
            writer.write(json.dumps([kind, *arguments]) + "\n")
            writer.flush()
            reply = json.loads(reader.readline(LONGEST_REPLY))
            if reply[0] == "value":
                return decode(reply[1], lambda number: Remote(int(number), ask))
            name, text = str(reply[1]), str(reply[2])
        except Exception as error:  # whatever is wrong with it
            gone = True
            raise Gone from error
        known = getattr(builtins, name, None)
        raise known(text) if isinstance(known, type) and issubclass(known, Exception) else RuntimeError(name, text)

    def ask(kind: str, *arguments):
        sent: list = []
        encoded = [encode(each, sent) for each in arguments]
        if sent:
            raise TypeError(f"a program cannot be given an object of class {type(sent[0]).__name__} of its tests")
        return exchange(kind, *encoded)

    def ask_for(*names: str) -> dict:
        """Those of these names that the program has: no others, whatever it answers."""
        found = exchange("names", *names)
        return {name: found[name] for name in names if name in found}

    try:
        if "calls" in tests:
            found = ask_for(tests["function"], "Solution")
            os.write(verdicts, b"r")
            for args, accepted in tests["calls"]:
                given = plain(attempt(found, tests["function"], args))
                os.write(verdicts, b"1" if given in map(plain, accepted) else b"0")
            return
        found = ask_for(*tests["names"])
        os.write(verdicts, b"r")
        namespace = {"__name__": "tests"} | found
        exec(compile(tests["setup"], "setup", "exec"), namespace)
        for test in tests["asserts"]:
            try:
                exec(compile(test, "test", "exec"), dict(namespace))
                passed = True
            except (Exception, SystemExit):
                passed = False
            if gone:  # though a bare `except` of the test may have caught it
                return
            os.write(verdicts, b"1" if passed else b"0")
    except Gone:
        pass


FAILED = object()


def attempt(found: dict, name: str, args: list):
    """What a function of the program gives, or that method of its class `Solution`; `FAILED` if it raises."""
    try:
        function = found[name] if name in found else getattr(found["Solution"](), name)
        return function(*args)
    except Exception:
        return FAILED


def plain(value):
    """Tuples as lists, all the way down: what comes from JSON has no tuples."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value


def main():
    part, user, given, *descriptors = sys.argv[1:]
    limits = {name: int(value) for name, _, value in (each.partition("=") for each in given.split(","))}
    if part == "start":  # another program, which the rest names
        give_up_rights(int(user), limits)
        os.execv(descriptors[0], descriptors)
    sources = [int(number) for number in descriptors]
    data = contents(sources[0])
    give_up_rights(int(user), limits)
    if part == "run":
        run(data)
    elif part == "serve":
        serve(data, sources[1])
    else:
        import json

        check(json.loads(data), sources[1], sources[2])


if __name__ == "__main__":
    main()
