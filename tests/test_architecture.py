"""The map of the house: which wing imports which, read from the sources. Arrows run one way, without circles.

Imports inside functions count; those under `if TYPE_CHECKING` count as arrows, but make no circle.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT


PACKAGE = ROOT / "fipo_trl"

# Of each wing, what it may import of the package besides itself
ARROWS = {
    "objective": set(),
    "engines": set(),
    "rewards": set(),
    "data": {"rewards"},
    "trainer": {"objective", "engines"},
    "evaluation": {"data", "rewards", "trainer"},
    "recipe": {"data", "rewards", "trainer", "evaluation"},
    "planning": {"data", "rewards", "trainer", "recipe"},
    "analysis": {"objective", "trainer", "evaluation", "recipe"},
    "commands": {"data", "rewards", "objective", "trainer", "evaluation", "recipe", "planning", "analysis", "root"},
    "root": {"objective", "trainer", "commands"},  # __init__.py and __main__.py
}
# Of these wings, all that they may import of others' packages
THIRD_PARTY = {"objective": {"torch"}, "engines": {"torch", "vllm"}}


class Import(NamedTuple):
    module: str  # that imports
    line: int
    name: str  # with its dots
    for_types: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


def name_of(path: Path) -> str:
    """`fipo_trl.rewards` of fipo_trl/rewards/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str, source: str) -> list[Import]:
    tree = ast.parse(source)
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for part in node.body
        for inner in ast.walk(part)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        found += [Import(module, node.lineno, name, node in for_types) for name in names]
    return found


IMPORTS = [found for module, path in MODULES.items() for found in imports_of(module, path.read_text())]


def wing(module: str) -> str:
    """`rewards` of fipo_trl.rewards.dapo; `root` of what lies in no wing."""
    first = module.split(".")[1:2]
    return first[0] if first and (PACKAGE / first[0]).is_dir() else "root"


def of_package(name: str) -> bool:
    return name.split(".")[0] == "fipo_trl"


def circle(imports: list[Import]) -> list[str]:
    """The modules of an import circle, the first one again at the end; none where there is no circle."""
    graph = {module: set() for module in MODULES}
    for found in imports:
        if of_package(found.name) and not found.for_types and found.name != found.module:
            graph[found.module].add(found.name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_wing_is_on_the_map():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == ARROWS.keys() - {"root"}


@pytest.mark.parametrize("of", ARROWS)
def test_arrows_run_one_way(of):
    imports = [found for found in IMPORTS if wing(found.module) == of and of_package(found.name)]
    assert [str(found) for found in imports if wing(found.name) not in {of} | ARROWS[of]] == []


def test_the_map_has_no_circle_of_wings():
    below_the_doors = {of: allowed for of, allowed in ARROWS.items() if of != "root"}
    TopologicalSorter({of: allowed - {"root"} for of, allowed in below_the_doors.items()}).prepare()


def test_no_modules_import_each_other_in_a_circle():
    assert circle(IMPORTS) == []


def test_a_circle_would_be_found():
    back = imports_of("fipo_trl.objective.future_kl", "def f():\n    from fipo_trl.objective import influence\n")
    of_objective = [found for found in IMPORTS if wing(found.module) == "objective"]
    assert set(circle([*of_objective, *back])) == {"fipo_trl.objective.future_kl", "fipo_trl.objective.influence"}


@pytest.mark.parametrize("of", THIRD_PARTY)
def test_a_wing_that_needs_little(of):
    allowed = sys.stdlib_module_names | THIRD_PARTY[of] | {"fipo_trl"}
    imports = [found for found in IMPORTS if wing(found.module) == of]
    assert imports
    assert [str(found) for found in imports if found.name.split(".")[0] not in allowed] == []


def test_commands_are_imported_by_themselves_and_by_the_door():
    outside = {
        found.module for found in IMPORTS if wing(found.name) == "commands" and wing(found.module) != "commands"
    }
    assert outside == {"fipo_trl.__main__"}


def test_the_package_imports_no_script_recipe_or_test():
    files = [path for folder in ("scripts", "recipes", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 10
    names = {path.stem for path in files} | {"scripts", "recipes", "tests"}
    of_others = [found for found in IMPORTS if not of_package(found.name)]
    # by its first part: `from quickstart import ...`, `import recipes.tiny.running_sums`
    assert [str(found) for found in of_others if found.name.split(".")[0] in names] == []
