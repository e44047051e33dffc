"""What a conversion says while it runs and when it is done."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from lrq.errors import counted, printable
from lrq.models.policy import NOT_A_WEIGHT

if TYPE_CHECKING:
    from lrq.measure import Budget
    from lrq.pipeline import LayerResult
    from lrq.plan import Plan
    from lrq.run import Summary

_SHOWN = 8.5
"""Bits up to which the error of other targets is told: beyond 8 the curve is flat."""


def sized(count: float) -> str:
    """Bytes for people: ``45.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def model_line(prefix: str, about: str, preset: str | None, policy: str) -> str:
    """What a part of the checkpoint was recognised as, and what is kept in it if that is not its preset."""
    where = f"{printable(prefix)}*: " if prefix else ""
    known = f"{about} (preset {preset})" if preset else about
    other = "" if policy == about else f"; kept by: {printable(policy) or 'no preset'}"
    return f"model: {where}{known}{other}"


def budget_line(budget: Budget) -> str:
    """What --target_bits bought, and what other targets would."""
    shown = [point for point in budget.curve if point[0] <= max(budget.target, _SHOWN)]
    curve = ", ".join(f"{bits:.2f} -> {error:.2f} %" for bits, error in shown[:: 1 + len(shown) // 10])
    return (
        f"target {budget.target:g} bits: {budget.bits:.2f} bits, error {budget.error:.2f} %; of other targets: {curve}"
    )


def _of_outputs(layer: LayerResult) -> str:
    """Which statistics of its inputs are known, the error that they predict, and by how much the bias moved."""
    error = layer.output
    if error is None:
        return f"; {layer.statistics}" if layer.statistics else ""
    corrected = f" -> {error.after:.4f}, bias moved by {error.shift:.4f}" if layer.corrected else ""
    return (
        f"; {layer.statistics}: output error by its statistics {error.before:.4f}{corrected}, "
        f"of round-to-nearest {error.of_nearest:.4f}"
    )


class Progress:
    """A bar on a terminal, nothing elsewhere; with ``verbose`` a line for every tensor."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[layer]}", markup=False),
        )
        self.bar = Bar(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.started = time.monotonic()
        self.models: list[str] = []

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def on_plan(self, plan: Plan) -> None:
        """Start the bar; with ``verbose`` say what is kept."""
        self.models = [
            model_line(part.prefix, part.about, part.preset.name if part.preset else None, plan.policies[part.prefix])
            for part in plan.parts
        ]
        # Where only the result is read, it comes with the result: a run that fails says one line.
        if self.console.is_terminal or self.verbose:
            self._say_models()
        self.task = self.bar.add_task("quantizing", total=len(plan.layers), layer="")
        if self.verbose:
            for name, reason in sorted({**plan.kept, **plan.refused}.items()):
                self._say(f"keep  {printable(name)}: {reason}")
            for name, reason in sorted(plan.bfloat16.items()):
                self._say(f"bfloat16  {printable(name)}: {reason}")

    def on_layer(self, layer: LayerResult) -> None:
        """Advance the bar; with ``verbose`` say how the layer went."""
        name = printable(layer.name)
        self.bar.update(self.task, advance=1, layer=name)
        if self.verbose:
            learned = ", ".join(
                f"{one.iterations} iterations, {one.stopped}, "
                f"objective {one.objective_after / max(one.objective_before, 1e-300):.3f}"
                for one in layer.outcomes[:1]
            )
            self._say(f"{layer.format}  {name} {list(layer.shape)}  {learned}{_of_outputs(layer)}")

    def summarise(self, summary: Summary) -> None:
        """The last words: what was written, what stayed and why."""
        self._say_models()
        for name, reason in sorted(summary.refused.items()):
            self._say(f"kept as it is  {printable(name)}: {reason}")
        for notice in summary.notices:
            self._say(f"notice: {notice}")
        if summary.budget is not None:
            self._say(budget_line(summary.budget))
        kept = Counter(reason for reason in summary.kept.values() if reason != NOT_A_WEIGHT)
        what = ", ".join(f"{counted(count, 'layer')} to {name}" for name, count in summary.formats.items())
        why = ", ".join(f"{reason} ({count})" for reason, count in kept.most_common())
        self._say(f"{what}; kept as they are: {why}" if why else what)
        saved = f"{sized(summary.source_size)} -> {sized(summary.output_size)}"
        seconds = time.monotonic() - self.started
        self._say(f"{printable(str(summary.output))}: {saved} in {seconds:.1f} s")
        use = summary.memory
        words = f"peak memory {sized(use.measured)}, predicted {sized(use.predicted)}"
        on_gpu = f"; of the GPU {sized(use.measured_vram)}, predicted {sized(use.predicted_vram)}"
        self._say(words + (on_gpu if use.predicted_vram else ""))

    def _say_models(self) -> None:
        for line in self.models:
            self._say(line)
        self.models = []

    def _say(self, line: str) -> None:
        self.console.print(Text(line))
