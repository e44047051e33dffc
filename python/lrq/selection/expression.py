"""Regular expressions of the user's, checked before use and run under a time limit."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from functools import cached_property

import regex

from lrq.errors import InputError, printable
from lrq.models.patterns import skeleton
from lrq.selection.pattern import read

TIME_LIMIT = 2.0
"""Seconds that one expression may take for all names together."""
LONGEST = 10_000
"""Characters of an expression."""
MOST_REPEATS = 100_000
"""Product of the counts in braces: the compiled expression takes memory in proportion."""

_RECURSION = re.compile(r"(?<!\\)\(\?(?:R|[+-]?\d|&|P>)")


class Names:
    """The names of a checkpoint's modules."""

    def __init__(self, names: Iterable[str]) -> None:
        self.all = list(names)
        self.known = set(self.all)

    @cached_property
    def by_kind(self) -> dict[str, list[str]]:
        """Those that differ in nothing but numbers, together."""
        kinds: dict[str, list[str]] = {}
        for name in self.all:
            kinds.setdefault(skeleton(name), []).append(name)
        return kinds


class Expression:
    """One regular expression.

    Raises:
        InputError: it does not compile, is too large, or takes too long; the message begins with ``where``.
    """

    def __init__(self, text: str, where: str, fullmatch: bool = False) -> None:
        self.text, self.where = text, where
        self._left = TIME_LIMIT
        counts = [max(map(int, filter(None, found))) for found in re.findall(r"\{(\d{1,9}),?(\d{0,9})\}", text)]
        too_many = re.search(r"\d{10}", text) or math.prod(max(count, 1) for count in counts) > MOST_REPEATS
        if len(text) > LONGEST or too_many:
            raise InputError(f"{where}: not a regular expression that can be run: too many repetitions, or too long")
        if _RECURSION.search(text):
            # Its memory grows faster than its time: the limit would come too late.
            raise InputError(f"{where}: not a regular expression that can be run: it calls itself")
        try:
            compiled = regex.compile(text)
        except (regex.error, OverflowError, RecursionError, ValueError) as error:
            raise InputError(f"{where}: not a regular expression: {printable(str(error))}") from None
        self.pattern = read(text)
        self._match = compiled.fullmatch if fullmatch else compiled.search

    def finds(self, name: str) -> bool:
        """Whether the expression finds the name; raises :class:`InputError` when its time is up."""
        started = time.perf_counter()
        try:
            found = self._match(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise InputError(
                f"{self.where}: takes over {TIME_LIMIT:g} s on names like {printable(name)}; "
                "write it without nested repetitions"
            ) from None
        self._left -= time.perf_counter() - started
        return found

    def among(self, names: Names) -> list[str]:
        """The names that the expression finds; it runs on no more of them than it must."""
        if self.pattern.of_kinds:
            return [name for alike in names.by_kind.values() if self.finds(alike[0]) for name in alike]
        found = names.all
        if self.pattern.whole:
            # Before a last line feed there is an end, too.
            found = [name for name in (self.pattern.whole, f"{self.pattern.whole}\n") if name in names.known]
        for group in self.pattern.needles:
            first, *more = group
            # Each by itself: to ask for any of some takes five times as long.
            hits = {name for needle in more for name in found if needle in name}
            found = [name for name in found if first in name or name in hits]
        return list(filter(self.finds, found))

    @property
    def literals(self) -> int:
        """How many characters it spells out: the more, the more specific."""
        return self.pattern.literals
