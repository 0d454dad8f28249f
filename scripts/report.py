"""A door to `fipo_trl.commands.report`."""

import sys

from fipo_trl.commands.report import main


if __name__ == "__main__":
    main(sys.argv[1:])
