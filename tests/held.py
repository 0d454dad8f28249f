"""A training that waits for its test at a generation of the test's choice, so that no signal races with its end.

So does an evaluation, at a batch. As a module of rewards this is imported by both (`held.exact_answer`), so it imports
little.
"""

import os
import subprocess
import time
from pathlib import Path

import psutil

from recipes.tiny import running_sums
from recipes.tiny.running_sums import predicted_answer  # noqa: F401  (an evaluation looks for it beside the reward)


REWARD = ["--reward_funcs", "held.exact_answer"]
PATIENCE = 600  # seconds; a loaded machine is slow, but it gets there
_generations = 0
_update = None  # after which the last one began


def exact_answer(prompts: list[str], completions: list[str], trainer_state=None, **kwargs) -> list[float]:
    """The tiny task's reward. Waits in the generation (of an evaluation: batch) that the environment names, if any."""
    global _generations, _update
    if trainer_state is None or trainer_state.global_step != _update:  # else: another round of dynamic sampling
        _generations += 1
        _update = trainer_state and trainer_state.global_step
    folder, generation = os.environ.get("HELD_IN"), os.environ.get("HELD_AT")
    if folder and _generations == int(generation):
        reached = Path(folder, f"reached_{os.environ.get('LOCAL_RANK', 0)}")
        reached.with_suffix(".new").write_text(str(os.getpid()))
        reached.with_suffix(".new").rename(reached)
        while not Path(folder, "go").exists():
            time.sleep(0.02)
    return running_sums.exact_answer(prompts, completions, **kwargs)


class HeldRun:
    """A command that trains with `REWARD`, held at its `generation`-th generation until `let_go`; else it is killed.

    Signals that it gets while it is held are handled there: training goes on to the end of the next update.

    Args:
        command: What to run, in the root of the repository.
        folder: An empty folder of its own, for what it prints (`log`) and the files by which it is held.
        generation: Counted from 1, in this process; a resumed run counts its own.
        processes: Of the training, each of which is held.
    """

    def __init__(self, command: list[str], folder: Path, generation: int, processes: int = 1):
        folder.mkdir()
        self.folder, self.log, self.processes = folder, folder / "log", processes
        environment = os.environ | {"HELD_IN": str(folder), "HELD_AT": str(generation)}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=Path(__file__).parents[1]
            )
        self.ranks: list[psutil.Process] = []  # those that train, once they are held
        self.tree: list[psutil.Process] = []  # all of its processes, once it is held

    def __enter__(self):
        """Wait until all processes are held."""
        try:
            self.wait_for(lambda: len(list(self.folder.glob("reached_?"))) == self.processes)
            pids = [int((self.folder / f"reached_{rank}").read_text()) for rank in range(self.processes)]
            self.ranks = [psutil.Process(pid) for pid in pids]
            launched = psutil.Process(self.process.pid)
            self.tree = [launched, *launched.children(recursive=True)]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        """Nothing outlives the test, whatever became of it."""
        if self.process.poll() is None:
            launched = psutil.Process(self.process.pid)
            self.tree = [*launched.children(recursive=True), launched]
        for process in self.tree:
            if lives(process):
                process.kill()
        self.process.wait()

    def wait_for(self, condition):
        """Wait until it is true, as long as the run lives."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def signal(self, number: int, process: psutil.Process | None = None, handled_by: int = 1):
        """Send a signal to the command, or to one of its processes; wait until so many of them have taken note."""
        (process or self.process).send_signal(number)
        self.wait_for(lambda: self.log.read_text().count("Stopping after this update") == handled_by)

    def let_go(self) -> int:
        """Let it go on, and wait for its end. Returns its exit status."""
        (self.folder / "go").touch()
        status = self.process.wait(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while left := list(filter(lives, self.tree)):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)
        return status


def lives(process: psutil.Process) -> bool:
    """Whether a process runs still; one that nobody has waited for yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
