"""The one error that a user can mend: the command line prints it as a single line and exits with code 2."""


class UserError(Exception):
    """Says what is wrong, where, and how to mend it, in one line."""
