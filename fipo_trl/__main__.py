"""`python -m fipo_trl` is `fipo-trl`."""

from fipo_trl.commands import main


if __name__ == "__main__":
    main()
