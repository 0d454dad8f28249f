"""`fipo-trl` itself."""

import pytest

from fipo_trl import commands


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
