"""A weight that is quantized: how, and who said so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from lrq.checkpoint.header import Entry
from lrq.config import Rounding
from lrq.dialects import comfyui
from lrq.formats import Format, Shape


@dataclass(slots=True)
class Layer:
    """A weight that is quantized."""

    name: str
    """Module name L; the weight is ``L.weight``."""
    source: Entry
    format: Format
    why: str = ""
    """The rule that chose the format; empty: the run's own format."""
    simple: bool | None = None
    """Round to nearest, or not; None: as the run does."""
    asked: bool = False
    """A rule of the user's chose the format."""
    full_precision: bool = False
    """The loader is told to multiply in 16 bits."""

    corrects: str | None = None
    """Dtype of the bias that takes the mean error; None: the bias stays as it is."""
    input_scale: float | None = None
    """What the loader divides the inputs by; None: there is none in the file."""
    statistics_size: int = 0
    """Bytes of the statistics of its inputs."""

    @property
    def marker(self) -> dict[str, object]:
        """The keys of its markers."""
        return marker_of(self.format, self.source.shape, self.full_precision)

    def rounding(self, run: Rounding) -> Rounding:
        """How its codes are chosen in a run with this rounding."""
        if run.optimizer == "gptq" and not self.statistics_size:
            run = replace(run, optimizer=None)
        return run if self.simple is None else replace(run, simple=self.simple)


@cache
def marker_of(fmt: Format, shape: Shape, full_precision: bool) -> dict[str, object]:
    """The keys of a layer's markers."""
    return comfyui.layer_marker(fmt, shape, full_precision)
