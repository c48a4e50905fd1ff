"""The one exception for a user's mistake: its message says what is wrong, where, and what would be right."""


class KronyError(ValueError):
    """Bad input that the user can mend. The command line prints its message and exits with code 2."""
