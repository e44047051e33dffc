"""The errors a user can cause or meet, and words for what is shown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_FEW = 3
"""Names that are listed one by one."""


class InputError(ValueError):
    """Bad input: the message is one line that says what, where and what to do."""


class UnfinishedError(InputError):
    """Not the input is at fault but a disk, its space or memory; what was written is kept for the next run."""


class RepeatedKeyError(ValueError):
    """A key of a JSON object that is there twice."""


def printable(name: str) -> str:
    """``name`` with control characters escaped, so that a file's own words can't steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(names: Collection[str]) -> str:
    """``a, b, c and 2 more``, in order."""
    shown = sorted(map(printable, names))
    more = f" and {len(shown) - _FEW} more" if len(shown) > _FEW else ""
    return f"{', '.join(shown[:_FEW])}{more}"


def unstyled(message: str) -> str:
    """A library's message without the colours of a terminal."""
    return _STYLE.sub("", message)


def first_duplicate(names: Iterable[str]) -> str:
    """The name that most of ``names`` are."""
    return Counter(names).most_common(1)[0][0]


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For :func:`json.loads`, whose last value of a key would win; raises :class:`RepeatedKeyError`."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise RepeatedKeyError(f"duplicate key {printable(first_duplicate(name for name, _ in pairs))!r}")
    return table


def unread(path: Path) -> str:
    """Why a file can't be opened, where a library does not say."""
    return "no permission" if path.exists() else "no such file"
