"""The `normswap` command, and `python -m normswap`."""

import sys


def main() -> None:
    """Run the command line. Importing it takes long enough for a Ctrl-C, so that it is imported here."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
