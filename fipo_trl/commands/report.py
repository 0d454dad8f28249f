"""Draw finished runs side by side."""

import argparse
import sys
from pathlib import Path

from fipo_trl.analysis.report import find_arms, write_report


DESCRIPTION = """\
Compare runs in the layout of the paper's figures 3, 4, 5 and 9: PNG files, and one HTML page that holds them all.

    fipo-trl report outputs/tiny-fipo outputs/tiny-dapo
    fipo-trl report 'FIPO=outputs/fipo-seed*' 'DAPO=outputs/dapo-seed*' --output_dir outputs/report

Each argument is one arm: a run, a folder of runs (seeds), or NAME=PATTERN. Runs of any trainer will do; what one did
not log is left out, and said.
"""


def main(arguments: list[str]):
    """Write the report, and print what is missing, the alarms, and where it is."""
    parser = argparse.ArgumentParser(
        prog="fipo-trl report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, a folder of runs, or NAME=PATTERN")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/report"), help="default: outputs/report")
    options = parser.parse_args(arguments)
    try:
        arms = find_arms(options.runs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for sentence in write_report(arms, options.output_dir):
        print(f"Left out: {sentence}")
    for name, runs in arms.items():
        for run in runs:
            if run.collapse:
                print(f"{name}, {run.folder}: alarm at update {run.collapse.update}: {run.collapse}")
    print(f"{options.output_dir / 'report.html'}")
