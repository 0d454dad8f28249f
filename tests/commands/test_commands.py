"""`fipo-trl` itself."""

import pytest

from fipo_trl import commands
from fipo_trl.commands.launch import launcher_words
from fipo_trl.commands.train_help import launch_parser
from fipo_trl.recipe.shipped import find_accelerate_config


def test_alone_it_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main([])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in commands.COMMANDS)


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["tarin"])
    assert end.value.code == 2
    assert "invalid choice: 'tarin' (choose from " in capsys.readouterr().err


def test_several_processes_without_a_gpu_get_a_file_that_says_so():
    """Else accelerate would start one process, and say nothing."""
    words = launcher_words(launch_parser().parse_args(["--cpu", "--num_processes", "3"]))
    assert words == ["--config_file", str(find_accelerate_config("two_cpu_processes")), "--num_processes", "3"]
    assert launcher_words(launch_parser().parse_args(["--cpu", "--num_processes", "1"])) == ["--num_processes", "1"]
    assert launcher_words(launch_parser().parse_args(["--cpu"])) == []
    given = launcher_words(
        launch_parser().parse_args(["--accelerate_config", "one_node_zero3", "--num_processes", "2"])
    )
    assert given == ["--config_file", str(find_accelerate_config("one_node_zero3")), "--num_processes", "2"]
