"""A door to `fipo_trl.commands.doctor`."""

import sys

from fipo_trl.commands.doctor import main


if __name__ == "__main__":
    main(sys.argv[1:])
