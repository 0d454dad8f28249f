"""A door to `fipo_trl.commands.train`."""

import sys

from fipo_trl.commands.train import main


if __name__ == "__main__":
    main(sys.argv[1:])
