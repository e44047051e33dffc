"""Arithmetic whose bits are those of ``reference/arithmetic.py``."""

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """float32 values of float32, bfloat16 or float16."""
    if x.dtype == tl.bfloat16:
        # What the GPU does; the interpreter's own conversion of subnormals is wrong.
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """``dtype`` of float32, ties to even."""
    if HARDWARE:
        return x.to(dtype)
    if dtype == tl.bfloat16:
        # The interpreter's own conversion does not round so.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def largest(t):
    """Maximum of 16 tensors."""
    a = tl.maximum(tl.maximum(tl.maximum(t[0], t[1]), tl.maximum(t[2], t[3])), tl.maximum(t[4], t[5]))
    b = tl.maximum(tl.maximum(tl.maximum(t[6], t[7]), tl.maximum(t[8], t[9])), tl.maximum(t[10], t[11]))
    return tl.maximum(tl.maximum(a, b), tl.maximum(tl.maximum(t[12], t[13]), tl.maximum(t[14], t[15])))


@triton.jit
def tree_sum(t):
    """Sum of 16 tensors in the order of the reference: halves are added until one is left."""
    a = ((t[0] + t[8]) + (t[4] + t[12])) + ((t[2] + t[10]) + (t[6] + t[14]))
    b = ((t[1] + t[9]) + (t[5] + t[13])) + ((t[3] + t[11]) + (t[7] + t[15]))
    return a + b


@triton.jit
def split_blocks(x, BLOCKS: tl.constexpr):
    """The 16 columns of BLOCKS blocks, each a tensor [BLOCKS]: a thread holds whole blocks, no sum crosses threads."""
    x = tl.permute(tl.reshape(x, (BLOCKS, 2, 2, 2, 2)), (0, 4, 3, 2, 1))
    a, b = tl.split(x)
    aa, ab = tl.split(a)
    ba, bb = tl.split(b)
    x0, x1, x2, x3 = _quarters(aa)
    x4, x5, x6, x7 = _quarters(ab)
    x8, x9, x10, x11 = _quarters(ba)
    x12, x13, x14, x15 = _quarters(bb)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _quarters(x):
    a, b = tl.split(x)
    x0, x1 = tl.split(a)
    x2, x3 = tl.split(b)
    return x0, x1, x2, x3
