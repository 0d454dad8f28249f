"""The recipes that come with this package: package data in a wheel, the folder beside the package in a clone."""

from importlib import resources
from pathlib import Path


def folder() -> Path:
    """The folder of recipes."""
    package = Path(str(resources.files("fipo_trl")))
    in_wheel = package / "recipe" / "recipes"
    return in_wheel if in_wheel.is_dir() else package.parent / "recipes"


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
