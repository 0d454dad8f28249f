"""The recipes that come with this package: package data in a wheel, the folder beside the package in a clone."""

import difflib
import re
from importlib import resources
from pathlib import Path


# What a recipe names of the shipped folder: paths, and modules of reward functions
PATH = re.compile(r"\brecipes/[\w./-]*\w")
MODULE = re.compile(r"\brecipes(?:\.\w+)+")


def folder() -> Path:
    """The folder of recipes."""
    package = Path(str(resources.files("fipo_trl")))
    in_wheel = package / "recipe" / "recipes"
    return in_wheel if in_wheel.is_dir() else package.parent / "recipes"


def recipes() -> dict[str, str]:
    """The recipes by name, such as `tiny/fipo`, and the first sentence of each."""
    paths = sorted(path for path in folder().glob("*/*.yaml") if path.parent.name != "accelerate")
    return {path.relative_to(folder()).with_suffix("").as_posix(): first_sentence(path) for path in paths}


def first_sentence(path: Path) -> str:
    """The first sentence of the comment at the head of a file, without its full stop."""
    head = path.read_text(encoding="utf-8").split("\n#\n", 1)[0]
    text = " ".join(line.removeprefix("#").strip() for line in head.splitlines())
    return re.split(r"(?<=\?)\s|\.\s|[.:]$|:\sarXiv", text, maxsplit=1)[0]


def files_of(name: str) -> list[Path]:
    """A recipe's file, and the shipped files that it names, as paths within the folder of recipes.

    Raises:
        ValueError: if there is no recipe of this name; with the nearest one.
    """
    name = name.removeprefix("recipes/").removesuffix(".yaml")
    if name not in recipes():
        nearest = difflib.get_close_matches(name, recipes(), n=1, cutoff=0)
        raise ValueError(f"There is no recipe '{name}'. Did you mean '{nearest[0]}'? `fipo-trl recipes` lists all.")
    recipe = folder() / f"{name}.yaml"
    text = recipe.read_text(encoding="utf-8")
    named = [folder().parent / path for path in PATH.findall(text)]
    whole = [folder().parent / path for path in PATH.findall(re.sub("#.*", "", text))]  # of folders, those it reads
    for module in MODULE.findall(text):  # of which the last names are functions
        parts = module.split(".")
        named += [folder().parent.joinpath(*parts[:length]).with_suffix(".py") for length in range(2, len(parts) + 1)]
    files = [recipe]
    for path in named:
        files += sorted(path.iterdir()) if path in whole and path.is_dir() else [path]
    return [path.relative_to(folder()) for path in dict.fromkeys(files) if path.is_file()]


def copy(name: str, to: Path) -> list[Path]:
    """Copy a recipe, and the shipped files that it names, to `TO/recipes`. What is there already and equal stays.

    Returns:
        The files, of which the first is the recipe.

    Raises:
        ValueError: if there is no such recipe, or a file would be overwritten by another. Nothing is copied then.
    """
    files = {to / "recipes" / file: (folder() / file).read_bytes() for file in files_of(name)}
    for path, content in files.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != content):
            raise ValueError(f"{path} exists and differs from the one that would be copied. Move it, or give --to.")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list(files)


def find_accelerate_config(name: str) -> Path:
    """A file of `accelerate config`, by its path or by its name in the shipped folder `accelerate`.

    Raises:
        ValueError: if there is none.
    """
    shipped = folder() / "accelerate"
    for path in (Path(name), shipped / f"{name}.yaml", shipped / name):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
    raise ValueError(f"accelerate_config={name}: there is no such file, nor one of the names {names}.")
