"""The one error that users are meant to see, and what they are not."""

from __future__ import annotations

import re


class UserError(Exception):
    """A mistake or a fault that the user can act on; its text is one line: what, where, and what to do.

    The stages and the command line print it without a stack trace.
    """


def without_password(address: str) -> str:
    """`address` without the name and password that may stand before its host: what is printed may be pasted elsewhere."""
    return re.sub(r"//[^/@\s]*@", "//", address)


def one_line(error: BaseException) -> str:
    """What `error` says in its first line, without passwords; its kind where it says nothing."""
    line = without_password((str(error).splitlines() or [type(error).__name__])[0])
    return line if len(line) <= 160 else line[:160].rsplit(" ", 1)[0] + " …"
