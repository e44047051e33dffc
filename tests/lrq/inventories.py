"""Names and shapes of published models, as headers and as sparse files."""

from __future__ import annotations

import gzip
import itertools
import json
from functools import cache
from pathlib import Path

from lrq.checkpoint.header import Entry, lay_out

FOLDER = Path(__file__).parents[1] / "fixtures" / "inventories"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))
Tensors = dict[str, tuple[str, tuple[int, ...]]]


@cache
def _table(name: str) -> dict:
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


def family(name: str) -> str:
    """The family of a model."""
    return _table(name)["family"]


def tensors(name: str) -> Tensors:
    """dtype and shape by name."""
    table = _table(name)
    found = dict(table["tensors"])
    for pattern in table.get("repeat", []):
        for values in itertools.product(*(range(*limits) for limits in pattern["over"].values())):
            known = dict(zip(pattern["over"], values, strict=True))
            found |= {key.format(**known): value for key, value in pattern["tensors"].items()}
    return {key: (dtype, tuple(shape)) for key, (dtype, shape) in found.items()}


def entries(inventory: Tensors) -> dict[str, Entry]:
    """A header's entries, without places."""
    return {name: Entry(name, dtype, shape, 0, 0) for name, (dtype, shape) in inventory.items()}


def sparse(path: Path, inventory: Tensors) -> Path:
    """A file of these tensors, all zeros: it takes no space on disk."""
    header, start = lay_out([(name, dtype, shape) for name, (dtype, shape) in inventory.items()], {})
    with path.open("wb") as file:
        file.write(start)
        file.truncate(header.data_start + header.data_size)
    return path


def small(inventory: Tensors, divisor: int = 16) -> Tensors:
    """The same names with matrices that are smaller by a divisor, so that they can be converted in a test."""
    return {
        name: (dtype, tuple(max(side // divisor, 1) for side in shape) if len(shape) > 1 else shape[:1] and (8,))
        for name, (dtype, shape) in inventory.items()
    }
