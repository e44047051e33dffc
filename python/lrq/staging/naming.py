"""What can go wrong with a layer, as one line that names it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from lrq.errors import InputError, UnfinishedError, printable
from lrq.rounding.moments import UnfitStatisticsError
from lrq.staging.tiles import Tile
from lrq_kernels.dispatch import BackendError

LARGEST = 2.0**100
"""A larger weight could leave float32: rounded up to the next value of a grid, or summed over a ConvRot group."""


def check_largest(source: Path, tensor: str, largest: float) -> None:
    """Raise :class:`InputError` where the largest magnitude of a tensor is beyond every format, or is none."""
    # Written so that NaN fails.
    if not largest <= LARGEST:
        what = f"the value {largest:.3g}, beyond every format" if math.isfinite(largest) else "NaN or Inf"
        raise InputError(
            f"{source}: {printable(tensor)} holds {what}; repair the source, or leave the layer away with "
            "--exclude_layers"
        )


@contextlib.contextmanager
def naming(tile: Tile) -> Iterator[None]:
    """Inside it, errors name the layer, and where memory is short its need and what helps.

    Raises:
        InputError: a backend that can't compute it, singular directions that can't be found.
        UnfinishedError: no memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise _shortage(tile, " of the GPU", "--max_vram auto cuts it into tiles, --device cpu") from None
    except MemoryError:
        raise _shortage(tile, "", "--max_ram cuts it into tiles, --low_memory") from None
    except BackendError as error:
        raise InputError(str(error)) from None
    except UnfitStatisticsError as error:
        raise InputError(f"the statistics of layer {printable(tile.layer.name)} are of no inputs: {error}") from None
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        reason = str(error).partition("\n")[0]
        name = printable(tile.layer.name)
        raise InputError(f"layer {name}: its singular directions can't be computed ({reason}); use --simple") from None
    except RuntimeError as error:
        # How torch says it of the CPU's memory.
        if "can't allocate memory" not in str(error):
            raise
        raise _shortage(tile, "", "--max_ram cuts it into tiles, --low_memory") from None


def _shortage(tile: Tile, where: str, remedy: str) -> UnfinishedError:
    name = f"layer {printable(tile.layer.name)} {list(tile.layer.source.shape)}"
    need = f"it needs about {tile.held() / 1e6:.1f} MB and what its rounding takes"
    return UnfinishedError(f"{name}: out of memory{where}; {need}; {remedy} and --simple need less")
