"""A process that calls one reward function, again and again, and can be killed.

It is a fresh Python, not a fork: a fork of a process with torch's threads or a GPU may hang. It does not import the
user's script either, as `multiprocessing` would: a script without `if __name__ == "__main__"` would train in there
once more. The function runs in its main thread, where signals can be handled (`math_verify` needs that).

This file is both ends, and imports the standard library alone: the other end is started by its path.
"""

import asyncio
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any


def pickled(function: Callable) -> bytes | None:
    """The function for another process, or `None` where that could not find it again.

    A closure, a lambda and what a script or notebook defines itself (`__main__`) cannot be imported elsewhere.
    """
    try:
        data = pickle.dumps(function)
    except Exception:  # pickle raises whatever the object does
        return None
    return None if b"__main__" in data else data


class TimedOut(Exception):
    """A reward function did not return in time."""


class RewardProcess:
    """The process of a reward function. It is started by the first call, kept, and started anew after a kill.

    Args:
        function: As [`pickled`] gives it.
        name: For errors.
    """

    def __init__(self, function: bytes, name: str):
        self.function, self.name = function, name
        self._process: Any = None  # a Popen, and a Connection to it, while it runs
        self._connection: Any = None
        self._ready = False

    def start(self):
        """Start it, unless it runs, and do not wait for it: what the function imports may take seconds."""
        if self._process is not None:
            return
        self._connection, theirs = Pipe()
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._ready = False
        self._connection.send((os.getpid(), sys.path))
        self._connection.send_bytes(self.function)

    def kill(self):
        """End it and what it has started, whatever it does. A call that waits for it in another thread raises."""
        process = self._process
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def call(self, arguments: bytes, timeout: float) -> tuple[Any, list[tuple]]:
        """Call the function.

        Args:
            arguments: Its keyword arguments, pickled.
            timeout: Seconds that it may take. What it imports, once, does not count.

        Returns:
            What it returned, and the (`log_extra` or `log_metric`, name, value) that it logged.

        Raises:
            TimedOut: and the process is killed, and started anew.
            RuntimeError: if the process ended.
            Exception: what the function raised.
        """
        answered = False
        try:
            self.start()
            if not self._ready:
                error = self._receive()[0]
                if error is not None:
                    raise error
                self._ready = True
            self._connection.send_bytes(arguments)
            in_time = self._connection.poll(timeout)
            error, value, logged = self._receive() if in_time else (TimedOut(), None, [])
            answered = in_time
        except (EOFError, ConnectionError):
            status = self._process.wait()
            raise RuntimeError(
                f"Reward function {self.name}: its process ended with status {status} in the call."
            ) from None
        finally:
            if not answered:  # what may still come through the pipe belongs to no later call
                self._forget()
        if error is not None:
            if not in_time:
                self.start()
            raise error
        return value, logged

    def _receive(self) -> tuple[Exception | None, Any, list[tuple]]:
        return pickle.loads(self._connection.recv_bytes())

    def _forget(self):
        self.kill()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


# The other end


def serve(connection: Connection):
    """Answer calls until the trainer is gone."""
    # Some schedulers send SIGTERM to every process of a run; the trainer decides what becomes of this one. Handlers,
    # not SIG_IGN, which programs that the function starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    parent, sys.path[:] = connection.recv()
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    try:
        function = pickle.loads(connection.recv_bytes())
        loop = asyncio.new_event_loop()
        send(connection, None, None, [])
    except Exception as error:
        send(connection, error, None, [])
        return
    while True:
        logged: list[tuple] = []

        def log(kind, name, value, logged=logged):
            logged.append((kind, name, value))

        try:
            received = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            arguments = pickle.loads(received)
            for kind in ("log_extra", "log_metric"):
                arguments[kind] = lambda name, value, kind=kind, log=log: log(kind, name, value)
            value = function(**arguments)
            if inspect.isawaitable(value):
                value = loop.run_until_complete(value)
            send(connection, None, value, logged)
        except Exception as error:
            send(connection, error, None, [])


def send(connection: Connection, error: Exception | None, value: Any, logged: list[tuple]):
    """Send a result or an error; something that can be said of it, where it cannot be pickled."""
    if error is not None:
        error.add_note("In the reward's own process:\n" + "".join(traceback.format_exception(error)).rstrip())
    try:
        data = pickle.dumps((error, value, logged))
        pickle.loads(data)
    except Exception as unpicklable:
        notes = getattr(error, "__notes__", [])
        error = RuntimeError(f"{error!r}" if error is not None else f"its result cannot be pickled: {unpicklable}")
        for note in notes:
            error.add_note(note)
        data = pickle.dumps((error, None, []))
    connection.send_bytes(data)


def end_with(parent: int):
    """End this process when its parent is gone, even in the middle of a call."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
