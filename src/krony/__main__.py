"""``krony`` and ``python -m krony``: starts the command line, and takes a Ctrl-C while it is still being imported."""

from __future__ import annotations

import sys


def start() -> None:
    """The entry point of the ``krony`` command."""
    try:
        from krony.cli.app import main

        main()
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    start()
