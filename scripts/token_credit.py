"""A door to `fipo_trl.commands.token_credit`."""

import sys

from fipo_trl.commands.token_credit import main


if __name__ == "__main__":
    main(sys.argv[1:])
