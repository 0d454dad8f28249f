import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from tiny import make_args

from fipo_trl.trainer.folder_lock import LOCK_NAME, hold_output_dir


HOLDER = """
import sys, types
from fipo_trl.trainer.folder_lock import hold_output_dir
hold_output_dir(types.SimpleNamespace(output_dir=sys.argv[1], process_index=0, world_size=1))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_held_by_one_run(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **pipes,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        args = make_args(tmp_path / "run")
        message = f"is in use: process {holder.pid} on {socket.gethostname()} trains in it"
        with pytest.raises(ValueError, match=message):
            hold_output_dir(args)
        hold_output_dir(make_args(tmp_path / "other"))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    hold_output_dir(args)  # the lock went with its process
    hold_output_dir(args)  # ours
    assert (tmp_path / "run" / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*run cannot be written: Not a directory"):
        hold_output_dir(make_args(tmp_path / "file" / "run"))
