"""The errors that a user can mend: the entry points print one as one line, without a traceback, and exit with its code."""


class UserError(ValueError):
    """Bad input. The message says what was given, what is expected, and what to do."""

    exit_code = 2


class MissingError(UserError):
    """Something that was asked for is not on this machine: weights, a GPU, SLURM."""

    exit_code = 4
