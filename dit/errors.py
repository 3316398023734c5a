"""The one error that users are meant to see, and errors of other libraries in one printable line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECRETS = "password|passwd|token|signature|secret|key|sig"  # ends of the names of what no query should show
MAX_LENGTH = 160  # characters of another library's message: where and what, without its dumps

# What errors for want of memory have in them: those of torch's allocators (GPU, CPU), of cuBLAS and cuDNN, of mmap and fork; and
# those of worker processes, which find no shared memory, or which the system has ended: it does so for no other reason.
WORKERS = ("allocate shared memory", "DataLoader worker (pid")
NO_MEMORY = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED", "Cannot allocate memory", *WORKERS)


class UserError(Exception):
    """A mistake or a fault that the user can act on; its text is one line: what, where, and what to do.

    The stages and the command line print it without a stack trace. Addresses in it lose their names and passwords.
    """

    def __init__(self, message: str):
        super().__init__(without_password(message))


def without_password(address: str) -> str:
    """Return `address` without the name and password before its host, and without secrets in its query.

    What is printed may be pasted elsewhere.
    """
    address = re.sub(r"//[^/\s]*@", "//", address)
    return re.sub(rf"([?&][\w-]*({SECRETS})=)[^&\s]+", r"\1…", address, flags=re.IGNORECASE)


def without_passwords(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` with every address in it as `without_password` has it: what is written may be shared."""

    def clean(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(clean, value))
        return without_password(value) if isinstance(value, str) else value

    return {key: clean(value) for key, value in settings.items()}


def one_line(error: BaseException, with_type: bool = False) -> str:
    """Return the message of `error` in one line of at most about `MAX_LENGTH` characters, without passwords.

    Args:
        error: any exception; its type stands for it where it has no message.
        with_type: whether its type goes before the message.
    """
    kind, text = type(error).__name__, without_password(" ".join(str(error).split()))
    line = text if len(text) <= MAX_LENGTH else text[:MAX_LENGTH].rsplit(" ", 1)[0] + " …"
    return (f"{kind}: {line}" if with_type else line) if line else kind


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` was raised since memory, a GPU's or the computer's, does not suffice."""
    kinds = (RuntimeError, OSError)  # torch's own class is a RuntimeError, and not the only one that torch raises
    return isinstance(error, MemoryError) or (isinstance(error, kinds) and any(text in str(error) for text in NO_MEMORY))


def out_of_memory(error: BaseException, advice: str = "") -> str:
    """Word an error for which `is_out_of_memory` is true: what happened, and `advice`, the setting to change, if there is one."""
    text = str(error)
    if any(worker in text for worker in WORKERS):
        what = "memory, or the shared part of it in /dev/shm, ran out in a worker process"
        rest = "a smaller runtime.num_workers or runtime.prefetch_factor may fit; in Docker, a larger --shm-size"
    elif isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text):
        what, rest = "the GPU ran out of memory", "ending other programs that use it may help; nvidia-smi lists them"
    else:
        what, rest = "memory ran out", "ending other programs may help"
    return "; ".join(part for part in (what, advice, rest) if part)


@contextmanager
def memory_errors(advice: str = "") -> Iterator[None]:
    """Turn an error for want of memory into a `UserError` with `advice`, the setting to change, if there is one."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory(error, advice)) from None


def http_status(error: BaseException | None) -> int | None:
    """Return the status of the HTTP answer that `error` reports or was raised because of; None if there was no answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None
