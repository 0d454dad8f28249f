"""Show which tokens got the credit: one HTML file of a trace that training stored with `token_credit_every`.

    python scripts/token_credit.py --run outputs/tiny-fipo             # the latest trace
    python scripts/token_credit.py --run outputs/tiny-fipo --step 160  # of this update

The file needs no network and nothing beside it. It lies beside the trace, in the folder token_credit of the run.
"""

import argparse
import sys

from fipo_trl.token_credit import write_page


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="OUTPUT_DIR", help="output_dir of the run")
    parser.add_argument("--step", type=int, help="the last update of a traced generation; default: the latest trace")
    options = parser.parse_args(arguments)
    try:
        path = write_page(options.run, options.step)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{path}: open it in a browser.")


if __name__ == "__main__":
    main()
