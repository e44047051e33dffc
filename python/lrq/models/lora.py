"""Files that hold no model but a change to one."""

from __future__ import annotations

import re
from collections.abc import Collection

_FACTOR = re.compile(r"(?:[._]lora[._](?:A|B|down|up)|\.lokr_w[12](?:_[ab])?|\.hada_w[12]_[ab])(?=\.|$)")


def lora_factors(names: Collection[str]) -> list[str]:
    """The factors of a LoRA, LoHa or LoKr; none where a layer that they change is there too: that is a model."""
    found = []
    for name in names:
        # A tenth of the time that the expression takes.
        if not ("lora" in name or "lokr_w" in name or "hada_w" in name):
            continue
        match = _FACTOR.search(name)
        if match is not None:
            layer = name[: match.start()]
            if f"{layer}.weight" in names or f"{layer}.base_layer.weight" in names:
                return []
            found.append(name)
    return found
