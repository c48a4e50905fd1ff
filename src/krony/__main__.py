"""``python -m krony`` is ``krony``."""

from krony.cli import main

main()
