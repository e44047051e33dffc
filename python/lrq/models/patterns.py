"""Patterns of module names: whole dotted parts, found anywhere in a name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_MAY_BE_A_NUMBER = re.compile(r"[\d?*\[\]!-]+")


def skeleton(name: str) -> str:
    """The name with every part that is a number replaced by #: layers of one kind share it."""
    return _NUMBER.sub("#", name)


class Patterns:
    """Finds any of some patterns: ``norm*`` finds blocks.0.norm1 but not blocks.0.prenorm, ``a.b`` two parts in a row.

    ``*`` stays within a part; ``^`` in front binds a pattern to the start of the name, ``$`` behind it to the end.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        numbered = [pattern for pattern in self.patterns if _is_numbered(pattern)]
        self._general = _compile([pattern for pattern in self.patterns if pattern not in numbered])
        self._numbered = _compile(numbered)

    @property
    def has_numbered(self) -> bool:
        """Whether one of the patterns tells one number from another."""
        return self._numbered is not None

    def is_numbered(self, name: str) -> bool:
        """Whether a pattern with a number in it finds this name: then its skeleton does not decide."""
        return self._numbered is not None and self._numbered.search(name) is not None

    def finds_kind(self, name: str) -> bool:
        """Whether a pattern that is the same for all numbers finds the name, or its skeleton."""
        return self._general is not None and self._general.search(name) is not None

    def finds(self, name: str) -> bool:
        """Whether any of the patterns finds the name."""
        return self.finds_kind(name) or self.is_numbered(name)


def _is_numbered(pattern: str) -> bool:
    """Whether the pattern tells one number from another."""
    parts = pattern.strip("^$").split(".")
    return any(_MAY_BE_A_NUMBER.fullmatch(part) and part.strip("*") for part in parts)


def _compile(patterns: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(_translate, patterns))) if patterns else None


def _translate(pattern: str) -> str:
    start = "^" if pattern.startswith("^") else r"(?:^|\.)"
    end = "$" if pattern.endswith("$") else r"(?:\.|$)"
    return start + r"\.".join(map(_translate_part, pattern.strip("^$").split("."))) + end


def _translate_part(part: str) -> str:
    """One part without the anchors of ``fnmatch``; its ``*`` stops at a dot."""
    return fnmatch.translate(part).removeprefix("(?s:").rsplit(")", 1)[0].replace(".*", "[^.]*")
