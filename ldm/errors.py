"""The one kind of error that a user can mend: the entry points print it as one line and exit 2, without a traceback."""


class UserError(ValueError):
    """Bad input. The message says what was given, what is expected, and what to do."""
