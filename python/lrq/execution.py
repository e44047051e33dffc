"""How a run is carried out; none of it changes a byte of a tensor.

As in :mod:`lrq.config`, every field carries its meaning beside its default, and ``cli.options`` builds the flags.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from lrq.errors import InputError, printable

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _setting(default: Any, meaning: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"meaning": meaning, **metadata})


@dataclass(frozen=True)
class Execution:
    """Memory, shards, and what becomes of an unfinished run."""

    low_memory: bool = _setting(False, "One layer in memory at a time: nothing is read ahead or written behind.")
    max_ram: str | None = _setting(
        None, "Memory of the process at most, 4GB or 800MiB; layers are cut into tiles to fit.", metavar="SIZE"
    )
    max_vram: str | None = _setting(
        None, "Memory of the GPU at most; auto: what is free. Layers are cut into tiles to fit.", metavar="SIZE"
    )
    shard_size: str | None = _setting(
        None,
        "Write files of at most this size, and an index: 5GB, 500MiB; a larger layer has a file of its own, what fits "
        "into one file is one.",
        metavar="SIZE",
    )
    restart: bool = _setting(False, "Begin again; otherwise a run goes on from where an unfinished one stopped.")

    @property
    def shard_bytes(self) -> int | None:
        """The size of a file in bytes."""
        return None if self.shard_size is None else parse_size("--shard_size", self.shard_size)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Execution:
        """Takes the settings of this class out of ``settings``.

        Raises:
            InputError: a size that is none.
        """
        own = {setting.name for setting in dataclasses.fields(cls)} & settings.keys()
        execution = cls(**{name: settings.pop(name) for name in own})
        execution.check()
        return execution

    @property
    def ram_bytes(self) -> int | None:
        """The bound of the process's memory in bytes."""
        return None if self.max_ram is None else parse_size("--max_ram", self.max_ram)

    @property
    def vram_bytes(self) -> int | None:
        """The bound of the GPU's memory in bytes; None: as the GPU says, or none."""
        return None if self.max_vram in (None, "auto") else parse_size("--max_vram", str(self.max_vram))

    def check(self) -> None:
        """Raise :class:`InputError` for sizes that are none."""
        _ = self.shard_bytes, self.ram_bytes, self.vram_bytes


def parse_size(flag: str, text: str) -> int:
    """Bytes of ``5GB``, ``1.5 GiB``, ``100000``.

    Raises:
        InputError: not a size, or zero.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,18})?)\s*([kmgt]i?|)b?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if size < 1:
        raise InputError(f"{flag} {printable(text)}: must be a size, as 8GB or 500MiB")
    return size
