"""Read YAML as DVC reads and writes it, and one clear line for whatever is wrong with it."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from dit.errors import UserError, one_line


def read_yaml(text: str, name: str) -> Any:
    """Return what the text of the file `name` holds, by the rules that DVC reads and writes with: YAML 1.2, where `no` is a text.

    Raises:
        UserError: it is not YAML; one line that names the line and the column.
    """
    try:
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        mark, where = error.problem_mark or error.context_mark, ""
        if mark:
            where = f" line {mark.line + 1}, column {mark.column + 1}:"
        tab = "; indent with blanks" if "'\\t'" in str(error.problem) else ""
        reason = one_line(ValueError(error.problem or error.context)).removeprefix("but ")
        raise UserError(f"{name}: not valid YAML:{where} {reason}{tab}") from None
    except Exception as error:  # Python's own conversions raise anything: 2024-13-45 a ValueError, [[[[… a RecursionError
        raise UserError(f"{name}: not valid YAML: {one_line(error, with_type=True)}") from None
