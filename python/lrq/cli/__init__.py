"""The command line: a view of :mod:`lrq.config` and :mod:`lrq.run`."""

from __future__ import annotations

from lrq.cli.main import convert_to_quant, main

__all__ = ["convert_to_quant", "main"]
