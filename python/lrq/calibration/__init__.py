"""What is known of the inputs of layers: measured, kept in a file, and used.

::

    with lrq.calibration.collect(model, layers=r"blocks\\.") as inputs:
        model(batch)
    inputs.save("stats.safetensors")
"""

from lrq.calibration.collect import Collector, collect
from lrq.calibration.inputs import InputStats, merge
from lrq.calibration.stats import Accumulator, StatsFile, load_stats, merge_stats, save_stats

__all__ = [
    "Accumulator",
    "Collector",
    "InputStats",
    "StatsFile",
    "collect",
    "load_stats",
    "merge",
    "merge_stats",
    "save_stats",
]
