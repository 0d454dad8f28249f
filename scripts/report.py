"""Compare runs in the layout of the paper's figures 3, 4, 5 and 9: PNG files, and one HTML page that holds them all.

    python scripts/report.py outputs/tiny-fipo outputs/tiny-dapo
    python scripts/report.py 'FIPO=outputs/fipo-seed*' 'DAPO=outputs/dapo-seed*' --output_dir outputs/report

Each argument is one arm: a run, a folder of runs (seeds), or NAME=PATTERN. Runs of any trainer will do; what one did
not log is left out, and said.
"""

import argparse
import sys
from pathlib import Path

from fipo_trl.report import find_arms, write_report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, a folder of runs, or NAME=PATTERN")
    parser.add_argument("--output_dir", type=Path, default="outputs/report", help="default: outputs/report")
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
