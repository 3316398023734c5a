"""What is printed: without passwords, one line, and one line of advice where memory does not suffice."""

from __future__ import annotations

import pytest

from dit.cli import main
from dit.commands import where
from dit.errors import without_password


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:p@ss@host/x", "https://host/x"),
        ("https://user:secret@host:5000", "https://host:5000"),
        ("https://host/x?token=abc&page=1", "https://host/x?token=…&page=1"),
        ("https://host/x?user=a&password=b", "https://host/x?user=a&password=…"),
        ("https://host/x?X-Amz-Signature=ff&b", "https://host/x?X-Amz-Signature=…&b"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        ("https://host/x?page=1", "https://host/x?page=1"),
        ("git@github.com:a/b", "git@github.com:a/b"),
    ],
)
def test_without_password(address, shown):
    assert without_password(address) == shown


def test_command_out_of_memory_is_one_line(monkeypatch, capsys):
    def fail(arguments):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(where, "run_where", fail)
    assert main(["where"]) == 1
    assert capsys.readouterr().err == "dit: memory ran out; ending other programs may help\n"
