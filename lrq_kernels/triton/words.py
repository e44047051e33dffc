"""Instructions on the bytes of 32-bit words (``csrc/cuda/packed.h``), and what they do for the interpreter."""

import triton
import triton.language as tl

from lrq_kernels.triton.arithmetic import NARROWS


@triton.jit
def _of_three(INSTRUCTION: tl.constexpr, a, b, c):
    return tl.inline_asm_elementwise(
        INSTRUCTION + " $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _pair(low, high):
    return (low.to(tl.int64) & 0xFFFFFFFF) | high.to(tl.int64) << 32


@triton.jit
def permute(low, high, selectors):
    """Byte i of the result is byte ``selectors[i]``, below 8, of the eight of ``low`` and ``high``."""
    if NARROWS:
        result = _of_three("prmt.b32", low, high, selectors)
    else:
        both = _pair(low, high)
        wide = both * 0
        for i in tl.static_range(4):
            wide |= (both >> ((selectors >> 4 * i) & 7) * 8 & 255) << 8 * i
        result = wide.to(tl.int32)
    return result


_LOAD = tl.constexpr(
    """{
    .reg .b32 offset;
    .reg .b64 place;
    mad.lo.u32 offset, $5, 144, $6;
    cvt.u64.u32 place, offset;
    add.u64 place, place, $4;
    ld.global.nc.v4.b32 {$0, $1, $2, $3}, [place];
    }"""
)


@triton.jit
def load_four(table, row, first):
    """Four words of a row of 36, aligned, from ``first`` on, that no thread of this kernel writes.

    The length is no power of two: offsets then are products, of which the units are free, instead of shifts.
    """
    if NARROWS:
        a, b, c, d = tl.inline_asm_elementwise(
            _LOAD,
            "=r,=r,=r,=r,l,r,r",
            [table.to(tl.int64), row, first * 4],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        place = table + row * 36 + first
        a, b, c, d = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    return a, b, c, d


@triton.jit
def select(mask, a, b):
    """Bits of ``a`` where the mask has ones, else of ``b``."""
    if NARROWS:
        result = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xca;", "=r,r,r,r", [mask, a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        result = (a & mask) | (b & (-1 - mask))
    return result


@triton.jit
def slope(x, steepness, height):
    """``x steepness + height``, between 0 and 1."""
    if NARROWS:
        result = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, steepness, height], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.minimum(tl.maximum(x * steepness + height, 0.0), 1.0)
    return result


@triton.jit
def dot_bytes(a, b, total):
    """``total`` and the products of four bytes."""
    if NARROWS:
        total = _of_three("dp4a.u32.u32", a, b, total)
    else:
        for i in tl.static_range(4):
            total += (a >> 8 * i & 255) * (b >> 8 * i & 255)
    return total


@triton.jit
def dot_low(pair, four, total):
    """``total`` and the products of the halves of ``pair`` and the two low bytes of ``four``."""
    if NARROWS:
        total = _of_three("dp2a.lo.u32.u32", pair, four, total)
    else:
        total += (pair & 0xFFFF) * (four & 255) + (pair >> 16 & 0xFFFF) * (four >> 8 & 255)
    return total


@triton.jit
def dot_high(pair, four, total):
    """The same of the two high bytes."""
    if NARROWS:
        total = _of_three("dp2a.hi.u32.u32", pair, four, total)
    else:
        total += (pair & 0xFFFF) * (four >> 16 & 255) + (pair >> 16 & 0xFFFF) * (four >> 24 & 255)
    return total
