"""The errors a user can cause or meet, and words for what is shown."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """Bad input: the message is one line that says what, where and what to do."""


class UnfinishedError(InputError):
    """Not the input is at fault but a disk, its space or memory; what was written is kept for the next run."""


def printable(name: str) -> str:
    """``name`` with control characters escaped, so that a file's own words can't steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def unread(path: Path) -> str:
    """Why a file can't be opened, where a library does not say."""
    return "no permission" if path.exists() else "no such file"
