"""Make one HTML page of a token credit trace."""

import argparse
import sys

from fipo_trl.analysis.token_credit_page import write_page


DESCRIPTION = """\
Show which tokens got the credit: one HTML file of a trace that training stored with `token_credit_every`.

    fipo-trl token-credit --run outputs/tiny-fipo              # the latest trace
    fipo-trl token-credit --run outputs/tiny-fipo --step 160   # of this update

The file needs no network and nothing beside it. It lies beside the trace, in the folder token_credit of the run.
"""


def main(arguments: list[str]):
    """Write the page, and print where it is."""
    parser = argparse.ArgumentParser(
        prog="fipo-trl token-credit", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="OUTPUT_DIR", help="output_dir of the run")
    parser.add_argument("--step", type=int, help="the last update of a traced generation; default: the latest trace")
    options = parser.parse_args(arguments)
    try:
        path = write_page(options.run, options.step)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{path}: open it in a browser.")
