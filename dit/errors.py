"""The one error that users are meant to see."""


class UserError(Exception):
    """A mistake or a fault that the user can act on; its text is one line: what, where, and what to do.

    The stages and the command line print it without a stack trace.
    """
