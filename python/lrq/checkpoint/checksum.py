"""CRC-32 of a tensor from those of its parts, in whatever order they were written."""

from __future__ import annotations

import zlib
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
"""Of CRC-32 (IEEE 802.3), the highest power in the lowest bit."""
_ONE = 1 << 31


def crc32(data: memoryview | bytes) -> int:
    """CRC-32 of some bytes."""
    return zlib.crc32(data)


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two parts from their own; ``length`` in bytes of the second.

    A CRC is a remainder of a polynomial over GF(2): the first part's moves up by x^(8·length) and the second's is
    added; what CRC-32 inverts at both ends cancels.
    """
    return _product(_power(8 * length), first) ^ second


def _product(a: int, b: int) -> int:
    """a·b modulo the polynomial."""
    total = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            total ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return total


@lru_cache(maxsize=1024)
def _power(exponent: int) -> int:
    """x^exponent modulo the polynomial."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result
