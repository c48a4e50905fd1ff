"""What krony raises for mistakes a user can mend, and how it warns."""


class KronyError(ValueError):
    """Bad input: the sentence says what is wrong, where, and what would be right. The command line exits with 2."""


class WriteError(KronyError):
    """A file can't be written, such as on a full disk: the same work can succeed where there is room."""


class KronyWarning(UserWarning):
    """Something that works, but not as well as it could: the sentence says what would help."""


class PromiseError(KronyError):
    """A promise is not kept, such as a healed model that got worse, or a size that no scheme keeps. The command line
    exits with 1.
    """
