"""Arithmetic whose bits are those of ``reference/arithmetic.py``."""

import triton
import triton.language as tl

NARROWS = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def widen(x):
    """float32 values of float32, bfloat16 or float16."""
    if x.dtype == tl.bfloat16:
        # What the GPU does; the interpreter's own conversion of subnormals is wrong.
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 values in another type, ties to even."""
    if dtype == tl.bfloat16:
        # What the GPU does; the interpreter's own conversion of subnormals is wrong.
        if NARROWS:
            return x.to(tl.bfloat16)
        else:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
            return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
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
