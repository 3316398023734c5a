"""The one error that users are meant to see, and errors of other libraries in one printable line."""

from __future__ import annotations

import re

MAX_LENGTH = 160  # characters of another library's message: where and what, without its dumps


class UserError(Exception):
    """A mistake or a fault that the user can act on; its text is one line: what, where, and what to do.

    The stages and the command line print it without a stack trace.
    """


def without_password(address: str) -> str:
    """Return `address` without the name and password before its host: what is printed may be pasted elsewhere."""
    return re.sub(r"//[^/@\s]*@", "//", address)


def one_line(error: BaseException, with_type: bool = False) -> str:
    """Return the message of `error` in one line of at most about `MAX_LENGTH` characters, without passwords.

    Args:
        error: any exception; its type stands for it where it has no message.
        with_type: whether its type goes before the message.
    """
    kind, text = type(error).__name__, without_password(" ".join(str(error).split()))
    line = text if len(text) <= MAX_LENGTH else text[:MAX_LENGTH].rsplit(" ", 1)[0] + " …"
    return (f"{kind}: {line}" if with_type else line) if line else kind
