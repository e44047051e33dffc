"""The Hadamard rotation. The digits in base 4 of a column, the lowest first, are the stages of the butterfly.

A digit must lie in the registers of a thread to be worked on. Triton's default layouts spread the last dimension over
the threads and leave the first to the registers: so digits are brought to the front, two at a time, and every other
dimension is kept behind them; only bringing digits to the front and back moves weights between threads. Weights are
moved in a type as narrow as can be: before they are widened, and after they are narrowed.
"""

import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.contract import width
from lrq_kernels.dispatch import kernel
from lrq_kernels.triton.arithmetic import narrow, widen
from lrq_kernels.triton.launch import Tile, accepts, current, matrices_of, merged

_WEIGHTS, _WARPS = 4096, 4
_LARGEST = 1024


@triton.jit
def _butterfly(a, b, c, d):
    s, t, u, v = a + b, a - b, c + d, c - d
    return s + v, s - v, t + u, u - t


@triton.jit
def _quarters(x):
    """The four of [4,M]."""
    M: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.permute(tl.reshape(x, (2, 2, M)), (0, 2, 1)))
    a, c = tl.split(tl.permute(even, (1, 0)))
    b, d = tl.split(tl.permute(odd, (1, 0)))
    return a, b, c, d


@triton.jit
def _whole(a, b, c, d):
    """[4,M] of its four."""
    M: tl.constexpr = a.shape[0]
    even, odd = tl.permute(tl.join(a, c), (1, 0)), tl.permute(tl.join(b, d), (1, 0))
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (4, M))


@triton.jit
def _swapped(x):
    """[16,M] with the two digits in the other order."""
    M: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (4, 4, M)), (1, 0, 2)), (16, M))


@triton.jit
def _stage(x):
    """The digit in front of [4,M]."""
    a, b, c, d = _quarters(x)
    a, b, c, d = _butterfly(a, b, c, d)
    return _whole(a, b, c, d)


@triton.jit
def _high_stage(x):
    """The digit in front of [4*M]; flat."""
    M: tl.constexpr = x.shape[0] // 4
    return tl.reshape(_stage(tl.reshape(x, (4, M))), (4 * M,))


@triton.jit
def _two_stages(x):
    """The two digits in front of [16,M], the lower of them first."""
    M: tl.constexpr = x.shape[1]
    a, b, c, d = _quarters(tl.reshape(_swapped(x), (4, 4 * M)))
    a, b, c, d = _butterfly(a, b, c, d)
    y = _whole(_high_stage(a), _high_stage(b), _high_stage(c), _high_stage(d))
    return _swapped(tl.reshape(y, (16, M)))


@triton.jit
def _front(x, DIGITS: tl.constexpr, SPAN: tl.constexpr):
    N: tl.constexpr = x.shape[0]
    x = tl.permute(tl.reshape(x, (N // (DIGITS * SPAN), DIGITS, SPAN)), (1, 0, 2))
    return tl.reshape(x, (DIGITS, N // DIGITS))


@triton.jit
def _back(x, DIGITS: tl.constexpr, SPAN: tl.constexpr):
    N: tl.constexpr = x.shape[0] * x.shape[1]
    x = tl.permute(tl.reshape(x, (DIGITS, N // (DIGITS * SPAN), SPAN)), (1, 0, 2))
    return tl.reshape(x, (N,))


@triton.jit
def rotated(x, GROUP: tl.constexpr):
    """Every GROUP columns of [ROWS,COLUMNS] rotated, float32, the last digits in front: [4 or 16,..] as of `placed`.

    COLUMNS is a multiple of GROUP.
    """
    flat = tl.reshape(x, (x.shape[0] * x.shape[1],))
    if GROUP == 4:
        y = _stage(widen(_front(flat, 4, 1))) * 0.5
    else:
        y = _two_stages(widen(_front(flat, 16, 1)))
    if GROUP == 16:
        y *= 0.25
    if GROUP == 64:
        y = _stage(_front(_back(y, 16, 1), 4, 16)) * 0.125
    if GROUP >= 256:
        y = _two_stages(_front(_back(y, 16, 1), 16, 16))
    if GROUP == 256:
        y *= 0.0625
    if GROUP == 1024:
        y = _stage(_front(_back(y, 16, 16), 4, 256)) * 0.03125
    return y


@triton.jit
def placed(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """What belongs to `rotated` weights, as [ROWS,COLUMNS]."""
    if GROUP == 4:
        z = _back(y, 4, 1)
    elif GROUP == 16:
        z = _back(y, 16, 1)
    elif GROUP == 64:
        z = _back(y, 4, 16)
    elif GROUP == 256:
        z = _back(y, 16, 16)
    else:
        z = _back(y, 4, 256)
    return tl.reshape(z, (ROWS, COLUMNS))


@triton.jit
def rotate_kernel(
    x,
    out,
    batch_stride,
    row_stride,
    rows,
    columns,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of rotated weights, in the type of ``out``."""
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    values = tl.load(x + batch * batch_stride + row.to(tl.int64) * row_stride + column, inside, 0.0)
    place = out + (batch * rows + row) * columns + column
    narrowed = narrow(rotated(values, GROUP), out.dtype.element_ty)
    tl.store(place, placed(narrowed, ROWS, COLUMNS, GROUP), inside)


def group_refusal(group: int) -> str | None:
    """None, or why a group is too large."""
    return f"the Hadamard group must be at most {_LARGEST}, got {group}" if group > _LARGEST else None


def tile_of_group(x: Tensor, group: int) -> Tile:
    """The tile for [..,M,N]; not less of a small matrix, for which there would be too few weights to a thread."""
    columns = width(x.shape[-1], _WEIGHTS, max(group, 16))
    return Tile(_WEIGHTS // columns, columns)


def rotate_matrices(x: Tensor, group: int, out: Tensor) -> None:
    """``out`` becomes the rotated [B,M,N]."""
    x = merged(x, group)
    tile = tile_of_group(x, group)
    rotate_kernel[tile.programs(x), len(x)](
        x,
        out,
        x.stride(0),
        x.stride(1),
        x.shape[1],
        x.shape[2],
        tile.across(x),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        GROUP=group,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


def _refusal(x: Tensor, group: int) -> str | None:
    return group_refusal(group) or _launches(x, group)


_launches = accepts(lambda x, group: tile_of_group(x, group).programs(x))


@kernel("rotate_hadamard", backend="triton", accepts=_refusal)
def rotate_hadamard(x: Tensor, group: int, out: Tensor) -> None:
    with current(x):
        rotate_matrices(matrices_of(x), group, out)
