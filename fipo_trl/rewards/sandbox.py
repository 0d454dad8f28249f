"""Programs of a model, run where they can do no harm: bubblewrap's sandbox, and limits.

A program has no network, sees of the file system the operating system and Python, read-only, and a small folder in
memory of its own, sees no other process, has no rights and no variables of the environment, and limits on CPU time,
time, memory, processes, file sizes, open files and output. When it ends, or is ended, all that it started ends too.
What runs in there is `sandbox_inside.py`.

bubblewrap (https://github.com/containers/bubblewrap) makes namespaces of the Linux kernel. Where an administrator has
not allowed these, nothing is isolated, and [`isolation_problem`] says so: it has tried.
"""

import contextlib
import functools
import logging
import os
import platform
import resource
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


INSIDE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_inside.py")
# Of the operating system, what a Python and its shared libraries may need; what there is of it
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
USERS = range(20_000, 60_000)  # numbers that no one has, of which each program gets one where root starts it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: Of each of its processes.
        seconds: From its start to its end.
        memory: Bytes of address space, of each of its processes.
        processes: With threads.
        disk: Bytes of its folder, which is in memory.
        files: That it may have open.
        output: Bytes on its standard output.
    """

    cpu_seconds: int = 5
    seconds: float = 10.0
    memory: int = 2**30
    processes: int = 16
    disk: int = 2**25
    files: int = 64
    output: int = 2**22

    def of_kernel(self, isolated: bool) -> dict[str, int]:
        """By the names of `resource`, without `RLIMIT_`."""
        limits = {"CPU": self.cpu_seconds, "FSIZE": self.disk, "NOFILE": self.files, "CORE": 0}
        if sys.platform != "darwin":  # macOS sets no such limit
            limits["AS"] = self.memory
        if isolated:  # else it would count all processes of the user
            limits["NPROC"] = self.processes
        for name, value in limits.items():
            _, most = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))  # of this process: no more can be given
            limits[name] = value if most == resource.RLIM_INFINITY else min(value, most)
        return limits


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        output: What it printed, as far as it was read.
        status: Its exit status (above 128: by a signal), or `None` where it was ended: over time, or over output.
    """

    output: bytes
    status: int | None


class Sandbox:
    """Starts programs, each in a sandbox of its own.

    Args:
        isolated: `False` leaves the limits and takes away all else.
        limits: See [`Limits`].
    """

    def __init__(self, isolated: bool = True, limits: Limits | None = None):
        self.isolated, self.limits = isolated, limits or Limits()

    def start(self, part: str, descriptors: Sequence[int], **streams) -> "Running":
        """Start `sandbox_inside.py`.

        Args:
            part: Of that file.
            descriptors: Of open files that it gets, the program's source first.
            **streams: `stdin`, `stdout`, `stderr` of `subprocess.Popen`; nothing by default.
        """
        return Running(self, part, descriptors, streams)

    def command(self, part: str, arguments: Sequence[str], filters: Sequence[int] = (), **options) -> list[str]:
        """The command line of a part of `sandbox_inside.py`, with its arguments.

        Args:
            filters, options: Of [`bubblewrap`].
        """
        # Not from `random`, whose state belongs to the training
        user = secrets.choice(USERS) if self.isolated and os.geteuid() == 0 else -1
        limits = ",".join(f"{name}={value}" for name, value in self.limits.of_kernel(self.isolated).items())
        around = bubblewrap(self.limits.disk, filters, **options) if self.isolated else []
        return [*around, real_python(), "-P", "-s", "-S", "-B", INSIDE, part, str(user), limits, *arguments]

    def run(self, source: str, given: bytes = b"") -> Ended:
        """Run a program as a script, with this on its standard input."""
        with (
            file_of(source.encode("utf-8", "replace")) as program,
            file_of(given) as stdin,
            self.start("run", [program.fileno()], stdin=stdin, stdout=subprocess.PIPE) as running,
        ):
            return running.finish()


class Running:
    """A program that has been started: a context that ends it, and all that it has started, when it is left."""

    def __init__(self, sandbox: Sandbox, part: str, descriptors: Sequence[int], streams: dict[str, Any]):
        self.deadline = time.monotonic() + sandbox.limits.seconds
        self.limits = sandbox.limits
        self._folder = None if sandbox.isolated else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with rules_for_system_calls() as filters:
            self.process = subprocess.Popen(
                sandbox.command(part, [str(number) for number in descriptors], filters),
                pass_fds=[*descriptors, *filters],
                env=ENVIRONMENT,
                cwd=None if self._folder is None else self._folder.name,
                start_new_session=True,
                **nothing | streams,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._folder is not None or self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # bubblewrap takes along what is inside
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self._folder is not None:
            self._folder.cleanup()

    def finish(self) -> Ended:
        """Read its output until it ends, or is ended."""
        assert self.process.stdout is not None  # the caller has asked for it
        output = bytearray()
        while (part := piece(self.process.stdout.fileno(), self.deadline - time.monotonic())) != b"":
            if part is None or len(output) > self.limits.output:
                return Ended(bytes(output), None)
            output += part
        try:
            status = self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Ended(bytes(output), None)
        return Ended(bytes(output), status if status >= 0 else 128 - status)


def piece(descriptor: int, seconds: float) -> bytes | None:
    """What comes through a pipe next: nothing more where it was closed, `None` where time is over."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return os.read(descriptor, 2**16) if waiting.poll(1000 * max(0.0, seconds)) else None


def file_of(data: bytes) -> IO[bytes]:
    """A file without a name that holds this, to be read from its start."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    file.write(data)
    file.seek(0)
    return file


def real_python() -> str:
    """The interpreter behind a virtual environment: its own libraries, none that were installed."""
    return os.path.realpath(sys.executable)


def bubblewrap(
    disk: int, filters: Sequence[int] = (), readable: Sequence[str] = (), end_with_parent: bool = True
) -> list[str]:
    """The command line that puts what follows it into a sandbox.

    Args:
        disk: Bytes of its folder.
        filters: Descriptors of files with rules for system calls.
        readable: Folders and files that it may read besides the system and Python.
        end_with_parent: Whether it ends with the thread that starts it.
    """
    python = [sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    paths = dict.fromkeys(os.path.abspath(path) for path in [*python, real_python(), INSIDE, *readable])
    found = shutil.which("bwrap") or "bwrap"  # the program's PATH is another one
    command = [found, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:  # gives up its rights inside, to a user whose processes the kernel counts; not those of root
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--disable-userns"]
    command += ["--die-with-parent"] * end_with_parent + ["--hostname", "sandbox", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp"]
    bound = [*SYSTEM, *(path for path in paths if not path.startswith("/usr/"))]
    parents = {str(parent) for path in bound for parent in Path(path).parents} - {"/", *bound}
    for path in sorted(parents):  # else they would be for root only
        command += ["--perms", "0755", "--dir", path]
    for path in bound:
        command += ["--ro-bind-try", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    for descriptor in filters:
        command += ["--seccomp", str(descriptor)]
    return [*command, "--"]


# Of each kind of processor: its number in rules, that of `clone`, and those of calls that no program of a test needs.
# They make namespaces or mounts, look into other processes, or hold memory that no limit counts: ptrace, mount,
# umount2, pivot_root, unshare, setns, bpf, userfaultfd, perf_event_open, add_key, request_key, keyctl,
# open_by_handle_at, process_vm_readv, process_vm_writev, shmget; and of all: io_uring_setup, open_tree, move_mount,
# fsopen, mount_setattr
REFUSED = (425, 428, 429, 430, 442)
CALLS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        56,
        (101, 165, 166, 155, 272, 308, 321, 323, 298, 248, 249, 250, 304, 310, 311, 29, *REFUSED),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (117, 40, 39, 41, 97, 268, 280, 282, 241, 217, 218, 219, 265, 270, 271, 194, *REFUSED),
    ),
}
CLONE3 = 435  # takes its flags in memory, where no rule can see them; the C library then calls `clone`
NEW_NAMESPACES = 0x7E020000  # flags of `clone`
ALLOW, KILL, NOT_PERMITTED, NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


@contextlib.contextmanager
def rules_for_system_calls() -> Iterator[list[int]]:
    """Descriptors of a file with [`system_call_rules`], to be inherited: one, or none where there are no rules."""
    rules = system_call_rules()
    if rules is None:
        yield []
    else:
        with file_of(rules) as file:
            yield [file.fileno()]


@functools.cache
def system_call_rules() -> bytes | None:
    """Rules for the kernel (seccomp) that refuse system calls, or `None` on processors whose numbers are not known.

    Source: https://docs.kernel.org/userspace-api/seccomp_filter.html
    """
    if platform.machine() not in CALLS:
        return None
    processor, clone, refused = CALLS[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    rules = [(load, 0, 0, 4), (equal, 1, 0, processor), (answer, 0, 0, KILL), (load, 0, 0, 0)]
    rules += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, NOT_PERMITTED)]  # another set of numbers, on x86-64
    for number in refused:
        rules += [(equal, 0, 1, number), (answer, 0, 0, NOT_PERMITTED)]
    rules += [(equal, 0, 1, CLONE3), (answer, 0, 0, NO_SUCH_CALL), (equal, 1, 0, clone), (answer, 0, 0, ALLOW)]
    rules += [(load, 0, 0, 16), (any_bit, 0, 1, NEW_NAMESPACES), (answer, 0, 0, NOT_PERMITTED), (answer, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)


# Whether there is a sandbox

HOW_TO = (
    "Install bubblewrap 0.8 or newer (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap). "
    "Where it is installed and namespaces are not allowed: on Ubuntu sysctl "
    "kernel.apparmor_restrict_unprivileged_userns=0, on Debian sysctl kernel.unprivileged_userns_clone=1; a container "
    "needs --security-opt seccomp=unconfined --security-opt apparmor=unconfined, and --cap-add SYS_ADMIN where it "
    "runs as root. To run programs of a model without isolation, as the user who trains and with limits only, set "
    "allow_unsandboxed: true."
)
PROBE = """
import os, socket
outside, port, processes = input().split("|")
if os.path.exists(outside):
    print("a program can read files outside")
try:
    socket.create_connection(("127.0.0.1", int(port)), timeout=1)
    print("a program can reach the network")
except OSError:
    pass
reading, writing = os.pipe()
try:
    for _ in range(int(processes) + 1):
        if os.fork() == 0:
            os.close(writing)
            os.read(reading, 1)  # until this program ends
            os._exit(0)
    print("a program can start as many processes as it likes")
except OSError:
    print("isolated")
"""


@functools.cache
def isolation_problem() -> str | None:
    """Why programs cannot be isolated on this machine, or `None` where they are. A real program tries to get out."""
    if sys.platform != "linux":
        return f"the sandbox is made of namespaces of the Linux kernel, and this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (there is no command 'bwrap')"
    sandbox = Sandbox()
    with tempfile.NamedTemporaryFile() as outside, socket.create_server(("127.0.0.1", 0)) as server:
        given = f"{outside.name}|{server.getsockname()[1]}|{sandbox.limits.processes}".encode()
        with file_of(PROBE.encode()) as program, file_of(given) as stdin:
            streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            with sandbox.start("run", [program.fileno()], **streams) as running:
                said = running.finish().output.decode(errors="replace").strip()
    return None if said == "isolated" else said[-500:] or "bubblewrap ended without a word"


def sandbox_or_error(allow_unsandboxed: bool = False, limits: Limits | None = None) -> Sandbox:
    """The sandbox of this machine.

    Args:
        allow_unsandboxed: Where programs cannot be isolated, to run them nevertheless. A warning says so.
        limits: Of [`Sandbox`].

    Raises:
        ValueError: where they cannot be isolated, saying what failed and how to mend it.
    """
    problem = isolation_problem()
    if problem is None:
        return Sandbox(limits=limits)
    if not allow_unsandboxed:
        raise ValueError(f"Programs of a model cannot be isolated here: {problem}. {HOW_TO}")
    warn_of(problem)
    return Sandbox(isolated=False, limits=limits)


@functools.cache
def warn_of(problem: str):
    """Once in a process."""
    logger.warning(
        "PROGRAMS OF THE MODEL RUN WITHOUT A SANDBOX, as the user who trains: they can read and delete files, and use "
        f"the network. allow_unsandboxed is set, and {problem}."
    )


def at_once() -> int:
    """How many programs to run at the same time: the cores that this process may use, shared with those of its run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
