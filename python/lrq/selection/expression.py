"""Regular expressions of the user's, checked before use and run under a time limit."""

from __future__ import annotations

import math
import re
import time

import regex

from lrq.errors import InputError, printable

TIME_LIMIT = 2.0
"""Seconds that one expression may take for all names together."""
LONGEST = 10_000
"""Characters of an expression."""
MOST_REPEATS = 100_000
"""Product of the counts in braces: the compiled expression takes memory in proportion."""

_RECURSION = re.compile(r"(?<!\\)\(\?(?:R|[+-]?\d|&|P>)")


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

    @property
    def literals(self) -> int:
        """How many characters it spells out: the more, the more specific."""
        plain = re.sub(r"\[(?:\\.|[^\]])*\]|\{[\d,]*\}|\\[A-Za-z]", "", self.text)
        return len(re.sub(r"\\(.)", r"\1", re.sub(r"(?<!\\)[.^$*+?()|]", "", plain)))
