"""The READMEs tell the truth: their links lead somewhere, their commands and settings exist, their recipe trains."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache

import pytest
import yaml
from conftest import ROOT

import fipo_trl
from fipo_trl import commands
from fipo_trl.recipe.read import Parser


README = ROOT / "README.md"
READMES = [
    README,
    *(
        path
        for folder in ("fipo_trl", "recipes", "scripts", "tests")
        for path in sorted((ROOT / folder).rglob("README.md"))
    ),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--([a-zA-Z][\w-]*)")
TAKE_SETTINGS = ("doctor", "vllm-server-command")  # of `fipo-trl train`, which their help does not repeat


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path, *languages):
    """The fenced blocks of some languages; "" are those of none."""
    return [body for language, body in FENCE.findall(path.read_text()) if language in languages]


def prose(path):
    """What is not in a fenced block or an indented one."""
    return re.sub(r"(?m)^    .*$", "", FENCE.sub("", path.read_text()))


def lines_of_code(path):
    """Each line of a block without a language and each span of code, lines that end in a backslash joined."""
    text = FENCE.sub("", path.read_text()).replace("\\\n", " ")
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    fenced = [line.strip() for body in blocks(path, "") for line in body.replace("\\\n", " ").splitlines()]
    return indented + fenced + re.findall(r"`([^`\n]+)`", prose(path))


def anchors(path):
    """GitHub's names of the headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", FENCE.sub("", path.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def help_of(*words):
    """What `--help` prints, of a command of fipo-trl or, where the first word ends in .py, of a script."""
    printed = io.StringIO()
    arguments = sys.argv
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        if words[0].endswith(".py"):
            script, *rest = words
            sys.argv = [script, *rest, "--help"]
            try:
                runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
            finally:
                sys.argv = arguments
        else:
            commands.main([*words, "--help"])
    return printed.getvalue()


def flags_of(*words):
    known = set(FLAG.findall(help_of(*words)))
    return known | (set(FLAG.findall(help_of("train"))) if words[0] in TAKE_SETTINGS else set())


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_links(path):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose(path)))
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_readme_is_reached_from_the_first():
    reached, todo = set(), [README]
    while todo:
        path = todo.pop()
        if path in reached:
            continue
        reached.add(path)
        names = re.findall(r"\]\(([^)\s#]+README\.md)(?:#[^)]*)?\)", prose(path))
        todo += [(path.parent / name).resolve() for name in names if "://" not in name]
    assert set(READMES) == reached


def test_length_of_the_first():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_commands_exist(path):
    """With each flag that they are shown with. Every command's help is asked for once."""
    makefile = (ROOT / "Makefile").read_text()
    for line in lines_of_code(path):
        for command, rest in re.findall(r"(?:fipo-trl|python -m fipo_trl) ([a-z][a-z-]*)([^;)#]*)", line):
            assert command in commands.COMMANDS, line
            words = [command, *re.match(r"\s*([a-z]*)", rest)[1].split()] if command == "recipes" else [command]
            assert set(FLAG.findall(rest)) <= flags_of(*words) | flags_of(command), line
        for script, rest in re.findall(r"(?<![\w/])scripts/(\w+\.py)([^;)#]*)", line):
            assert (ROOT / "scripts" / script).is_file(), line
            subcommand = re.match(r" ([a-z-]+)", rest) if script == "benchmark.py" else None
            words = [subcommand[1]] if subcommand else []
            assert set(FLAG.findall(rest)) <= flags_of(script, *words), line
        if target := re.match(r"make ([a-z][a-z-]*)", line):
            assert re.search(rf"(?m)^{target[1]}:", makefile), line
        for file in re.findall(r"(?<![\w/])recipes/[\w./-]+\.(?:yaml|sbatch|py)", line):
            assert (ROOT / file).is_file(), line


def test_commands_are_all_in_the_table():
    assert set(re.findall(r"(?m)^\| `fipo-trl ([a-z-]+)` \|", README.read_text())) == commands.COMMANDS.keys()
    headings = re.findall(r"(?m)^## (.*)$", (ROOT / "fipo_trl" / "commands" / "README.md").read_text())
    assert commands.COMMANDS.keys() <= set(headings)


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_settings_of_yaml_blocks_exist(path):
    parser = Parser()
    for block in blocks(path, "yaml"):
        for name, value in yaml.safe_load(block).items():
            assert name in parser.settings, name
            parser.check(name, value)


def test_modules_of_the_map_exist():
    names = {path.name for folder in ("fipo_trl", "scripts", "recipes") for path in (ROOT / folder).rglob("*.py")}
    path = ROOT / "fipo_trl" / "README.md"
    named = {name for line in lines_of_code(path) for name in re.findall(r"(\w+\.py)\b", line)}
    assert named <= names
    folders = {init.parent.name for init in (ROOT / "fipo_trl").glob("*/__init__.py")}
    assert folders == set(re.findall(r"(?m)^(\w+)/ ", blocks(path, "")[0]))


def test_names_of_the_diff_exist():
    (diff,) = blocks(README, "diff")
    names = re.findall(r"(?m)^\+from fipo_trl import (.*)$", diff)[0].split(", ")
    assert names
    assert all(hasattr(fipo_trl, name) for name in names)


@pytest.mark.slow
def test_the_recipe_that_is_shown_trains_and_is_evaluated(tmp_path):
    """As a reader would do it, for fewer updates and samples: the files saved, the two commands given."""
    text = README.read_text()
    for language, name in [("python", "my_reward.py"), ("yaml", "my_recipe.yaml")]:
        assert f"`{name}`" in text
        (tmp_path / name).write_text(blocks(README, language)[0])
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    train, evaluate = (
        next(line.strip() for line in text.splitlines() if line.startswith(f"    fipo-trl {name}"))
        for name in ("train", "evaluate")
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for line, fewer in [(train, ["--max_steps", "16"]), (evaluate, ["--n", "1"])]:
        command = [sys.executable, "-m", "fipo_trl", *shlex.split(line)[1:], *fewer]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "outputs/mine/trainer_state.json").read_text())["log_history"]
    rewards = [row["rewards/right_answer/mean"] for row in rows if "loss" in row]
    assert len(rewards) == 2
    assert all(0 < reward < 1 for reward in rewards)
    assert max(row.get("fipo/active_fraction", 0.0) for row in rows) > 0.1
    assert "avg@1" in run.stdout
