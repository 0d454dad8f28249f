"""Calls of reward functions: what they return is checked, how long they take is bounded, who runs can be asked.

A reward function is the part of a run that its user writes, and the part that talks to other services. So mistakes in
what it returns are told where they are made, in the function's name; a call that hangs is ended after
`reward_timeout`, or by a second signal; and on several processes a failure on one of them is one on all, lest the
others wait for it. Reward models are left alone.
"""

import asyncio
import functools
import inspect
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

from fipo_trl.trainer.reward_process import RewardProcess, TimedOut, pickled


LARGEST = torch.finfo(torch.float32).max  # rewards are float32 in TRL; what is larger becomes infinite
SHOWN = 80  # characters of a wrong value in an error

logger = get_logger(__name__)


class GenerationGivenUp(KeyboardInterrupt):
    """A second signal ended a call of a reward function. The last update is the state of the run."""


class RewardFailedElsewhere(RuntimeError):
    """A reward function failed on another process."""


# Who runs


class RunningReward:
    """A call of a reward function that has begun and not ended."""

    def __init__(self, name: str, cancel: Callable[[], Any] | None = None):
        self.name, self.cancel, self.started = name, cancel, time.monotonic()

    def __str__(self) -> str:
        return f"in reward {self.name} since {time.monotonic() - self.started:.0f} s"


RUNNING: list[RunningReward] = []  # of this process, by their beginning


@contextmanager
def running(name: str, cancel: Callable[[], Any] | None = None) -> Iterator[None]:
    """Be found in `RUNNING`."""
    call = RunningReward(name, cancel)
    RUNNING.append(call)
    try:
        yield
    finally:
        RUNNING.remove(call)


def give_up():
    """End the reward functions that run; for a signal handler, in the main thread.

    Raises:
        GenerationGivenUp: here, so in the function that runs, or in what waits for it. Asynchronous functions are
            cancelled; on several processes that is all that is done, and they hear of it when they meet.
    """
    cancelled = [call.cancel() for call in RUNNING if call.cancel is not None]
    if not (cancelled and torch.distributed.is_initialized()):
        raise GenerationGivenUp


# What runs


class RewardCalls:
    """The reward functions of a trainer, wrapped.

    Args:
        functions, names: The trainer's, reward models among them.
        timeout: Seconds that a call may take. `None`: as long as it takes, and the function runs where TRL runs it.
        timeout_action: `"nan"` or `"error"`.
    """

    def __init__(
        self, functions: Sequence[Callable], names: Sequence[str], timeout: float | None, timeout_action: str
    ):
        self.names, self.timeout, self.timeout_action = list(names), timeout, timeout_action
        self.functions = [self._wrap(function, name) for function, name in zip(functions, names, strict=True)]
        self.nothing_scored = False  # in the generation of now
        self._failure: BaseException | None = None  # on this process, of a function that the others still wait for
        self._warned: set[str] = set()

    def finish(self, rewards: Tensor, accelerator: Accelerator):
        """Called when all functions have been called, with the rewards (rows of all processes, F).

        Raises:
            GenerationGivenUp: if a signal ended a function, on this process or another.
            Exception: what a function raised on this process.
            RewardFailedElsewhere: if one failed on others only.
        """
        failure, self._failure = self._failure, None
        if accelerator.num_processes > 1:
            failures = gather_object([failure and (isinstance(failure, GenerationGivenUp), repr(failure))])
            if any(each and each[0] for each in failures):
                raise GenerationGivenUp
            if failure is None:
                for process, each in enumerate(failures):
                    if each:
                        raise RewardFailedElsewhere(f"A reward function failed on process {process}: {each[1]}")
        if failure is not None:
            raise failure
        self._warn_of_unscored(rewards.isnan())

    def _warn_of_unscored(self, unscored: Tensor):
        """Say so once of each function that scored no completion of a generation, and once if none did."""
        self.nothing_scored = bool(unscored.all())
        silent = [name for name, column in zip(self.names, unscored.all(dim=0).tolist(), strict=True) if column]
        if self.nothing_scored and "" not in self._warned:
            self._warned |= {"", *silent}
            logger.warning(
                f"No completion of this generation was scored: {', '.join(silent)} returned None or NaN for all "
                f"{len(unscored)} completions. The policy learns nothing from them. Check that the columns of the "
                "dataset which the reward reads hold what it expects."
            )
        for name in silent:
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    f"Reward function {name} scored no completion of this generation: it returned None or NaN for all "
                    f"{len(unscored)}. That is right if it is for other rows of the dataset only."
                )

    def _wrap(self, function: Callable, name: str) -> Callable:
        """The function with its name, signature and module, and all that this module adds."""
        if isinstance(function, nn.Module):
            return function
        data = pickled(function) if self.timeout is not None else None
        process = RewardProcess(data, name) if data is not None else None

        def checked(*args, **kwargs):
            if "completions" not in kwargs:  # called by hand, not by TRL
                return function(*args, **kwargs)
            try:
                with running(name):
                    return check(self._bounded(function, name, process, args, kwargs), name, kwargs)
            except (Exception, GenerationGivenUp) as error:
                return self._failed(error, kwargs)

        async def checked_async(*args, **kwargs):
            if "completions" not in kwargs:
                return await function(*args, **kwargs)
            task: Any = asyncio.current_task()
            loop = asyncio.get_running_loop()
            try:
                with running(name, lambda: loop.call_soon_threadsafe(task.cancel)):
                    return check(await self._bounded_async(function, name, process, args, kwargs), name, kwargs)
            except asyncio.CancelledError:  # by `give_up`; not to be raised in an event loop, which it would end
                if process is not None:
                    process.kill()
                if torch.distributed.is_initialized():
                    self._failure = self._failure or GenerationGivenUp()
                return [None] * len(kwargs["completions"])
            except Exception as error:
                return self._failed(error, kwargs)

        wrapper = checked_async if is_async_callable(function) else checked
        functools.update_wrapper(wrapper, function, updated=())  # not the attributes of a callable object
        wrapper.__name__ = name
        return wrapper

    def _failed(self, error: BaseException, kwargs: Mapping) -> list[None]:
        """Raise at once in a single process; else when the processes have met, which wait for this one's rewards."""
        if not torch.distributed.is_initialized():
            raise error
        self._failure = self._failure or error
        return [None] * len(kwargs["completions"])

    def _bounded(self, function: Callable, name: str, process: RewardProcess | None, args: tuple, kwargs: dict):
        if self.timeout is None:
            return function(*args, **kwargs)
        try:
            arguments = for_process(args, kwargs) if process is not None else None
            if process is None or arguments is None:
                value, logged = in_thread(function, args, kwargs, self.timeout)
            else:
                value, logged = process.call(arguments, self.timeout)
        except TimedOut:
            return self._timed_out(name, kwargs)
        replay(logged, kwargs)
        return value

    async def _bounded_async(
        self, function: Callable, name: str, process: RewardProcess | None, args: tuple, kwargs: dict
    ):
        if self.timeout is None:
            return await function(*args, **kwargs)
        if process is not None and for_process(args, kwargs) is not None:
            return await asyncio.to_thread(self._bounded, function, name, process, args, kwargs)
        call = asyncio.ensure_future(function(*args, **kwargs))
        done, _ = await asyncio.wait([call], timeout=self.timeout)
        if not done:
            call.cancel()
            return self._timed_out(name, kwargs)
        return call.result()

    def _timed_out(self, name: str, kwargs: Mapping) -> list[None]:
        rows = len(kwargs["completions"])
        message = f"Reward function {name} did not return within reward_timeout={self.timeout:g} s"
        if self.timeout_action == "error":
            raise TimeoutError(f"{message}. Its {rows} completions are not scored; to go on without, set 'nan'.")
        logger.warning(f"{message}: its {rows} completions are not scored.", main_process_only=False)
        return [None] * rows


def for_process(args: tuple, kwargs: dict) -> bytes | None:
    """The arguments of a call for another process, or `None` where they belong to this one.

    Environments are asked for what happened in them; a copy elsewhere would answer, and forget.
    """
    if args or kwargs.get("environments") is not None:
        return None
    try:
        return pickle.dumps({name: value for name, value in kwargs.items() if name not in ("log_extra", "log_metric")})
    except Exception:  # pickle raises whatever an object does
        return None


def in_thread(function: Callable, args: tuple, kwargs: dict, timeout: float) -> tuple[Any, list[tuple]]:
    """Call a function in a thread. After the timeout the thread is left to itself: it cannot be ended.

    Returns, and raises, what [`RewardProcess.call`] does.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()
    logged: list[tuple] = []
    recorders = {
        kind: lambda name, value, kind=kind: logged.append((kind, name, value))
        for kind in ("log_extra", "log_metric")
        if kind in kwargs
    }

    def run():
        try:
            answers.put((function(*args, **kwargs | recorders), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answers.get(timeout=timeout)
    except queue.Empty:
        raise TimedOut from None
    if error is not None:
        raise error
    return value, logged


def replay(logged: Iterable[tuple], kwargs: Mapping):
    """Give to TRL what a function logged elsewhere."""
    for kind, name, value in logged:
        if kwargs.get(kind) is not None:
            kwargs[kind](name, value)


# What it returned


def check(values: Any, name: str, kwargs: Mapping) -> list[float | None]:
    """What a reward function returned, as a list of numbers, with `None` for what it did not score.

    Raises:
        ValueError: unless it is a list (tuple, tensor, array, generator) of a number or `None` for each completion.
    """
    rows = len(kwargs["completions"])
    expected = f"Expected is a list of {rows} numbers, one for each completion (None: not scored)."
    if hasattr(values, "tolist"):  # a tensor or array
        values = values.tolist()
    if values is None or isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"Reward function {name} returned {shown(values)}. {expected}")
    values = list(values)
    if len(values) != rows:
        raise ValueError(f"Reward function {name} returned {len(values)} rewards. {expected}")
    for row, value in enumerate(values):
        if value is None:
            continue
        try:
            number = None if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several numbers
            number = None
        if number is None:
            raise ValueError(f"Reward function {name} returned {shown(value)} for completion {row}. {expected}")
        if abs(number) > LARGEST:
            raise ValueError(
                f"Reward function {name} returned {shown(value)} for completion {row}, which is infinite. The "
                f"advantages of its group would be NaN. {expected}"
            )
        values[row] = number
    return values


def shown(value: Any) -> str:
    """A value and its type, for an error."""
    if inspect.iscoroutine(value):
        value.close()
        return "a coroutine (write it as 'async def', so that it is awaited)"
    text = repr(value)
    text = text if len(text) <= SHOWN else text[:SHOWN] + " ..."
    return text if value is None else f"{text} ({type(value).__name__})"
