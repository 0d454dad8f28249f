"""A door to `fipo_trl.commands.evaluate`."""

import sys

from fipo_trl.commands.evaluate import main


if __name__ == "__main__":
    main(sys.argv[1:])
