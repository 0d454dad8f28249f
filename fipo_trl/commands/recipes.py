"""List the recipes that come with this package, or copy one."""

import argparse
import sys
from pathlib import Path

from fipo_trl.recipe.shipped import copy, recipes


DESCRIPTION = """\
List the recipes that come with this package; or copy one, to train with it or to change it.

    fipo-trl recipes
    fipo-trl recipes copy tiny/fipo
    fipo-trl train --config recipes/tiny/fipo.yaml

A copy lies in TO/recipes/NAME.yaml, with the shipped files that the recipe names: models, data, rewards, accelerate
configs. A file that is there already and differs is never overwritten.
"""


def main(arguments: list[str]):
    """Print the list, or copy a recipe and print where its files are."""
    parser = argparse.ArgumentParser(
        prog="fipo-trl recipes",
        usage="fipo-trl recipes [copy NAME [--to DIR]]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="copy")
    copying = commands.add_parser(
        "copy", help="copy a recipe", usage="fipo-trl recipes copy NAME [--to DIR]", allow_abbrev=False
    )
    copying.add_argument("name", metavar="NAME", help="as the list has it, such as tiny/fipo")
    copying.add_argument("--to", type=Path, default=Path("."), metavar="DIR", help="default: the working directory")
    options = parser.parse_args(arguments)
    if options.command is None:
        listed = recipes()
        width = max(map(len, listed))
        for name, sentence in listed.items():
            print(f"{name:{width}}  {sentence}")
        return
    try:
        files = copy(options.name, options.to)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, files)))
