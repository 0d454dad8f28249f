"""Reward functions that fail, for tests: importable, as a recipe's are. What they do is told by files in a folder."""

import asyncio
import os
import random
import threading
import time
from pathlib import Path

import torch


FOLDER = "FIPO_TEST_FOLDER"  # of the environment
FOREVER = 10_000


def length(completions, **kwargs):
    return [len(completion) / 10 for completion in completions]


def fails_once(completions, trainer_state, **kwargs):
    """A service that goes down in the second generation, and is up again when the run goes on."""
    down = Path(os.environ[FOLDER], "down")
    if trainer_state.global_step >= 8 and down.exists():
        random.random(), torch.rand(1)  # what a failed generation draws is no part of the run
        down.unlink()
        raise ConnectionError("the sandbox is gone")
    return [len(completion) / 10 for completion in completions]


def fails_once_on_one_process(completions, **kwargs):
    if os.environ.get("RANK") == "1":
        return fails_once(completions, **kwargs)
    return length(completions)


def is_to_hang(trainer_state):
    """In the second generation one process is, once; in sight of who waits for that, and the others are, too."""
    if trainer_state.global_step < 8:
        return False
    hang = Path(os.environ[FOLDER], "hang")
    try:
        hang.rename(hang.with_name("hangs"))
    except FileNotFoundError:
        hang.with_name("hangs_not").touch()
        return False
    return True


def hangs_once(completions, trainer_state, **kwargs):
    if is_to_hang(trainer_state):
        time.sleep(FOREVER)
    return [len(completion) / 10 for completion in completions]


async def hangs_once_async(completions, trainer_state, **kwargs):
    if is_to_hang(trainer_state):
        await asyncio.sleep(FOREVER)
    return [len(completion) / 10 for completion in completions]


def hangs(completions, **kwargs):
    time.sleep(FOREVER)


def hangs_for_some(completions, prompts, **kwargs):
    if prompts[0] == "hang":
        time.sleep(FOREVER)
    return [float(os.getpid())] * len(completions)


def main_thread(completions, log_extra, log_metric, **kwargs):
    log_extra("column", completions)
    log_metric("metric", 0.5)
    return [float(threading.current_thread() is threading.main_thread())] * len(completions)


async def process_async(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(os.getpid())] * len(completions)


def dies(completions, **kwargs):
    os._exit(7)


def refuses(completions, **kwargs):
    raise ConnectionError("refused")
