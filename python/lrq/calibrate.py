"""Makes files of statistics: from a Hugging Face text model and texts, or from a checkpoint alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from lrq.calibration.collect import collect
from lrq.calibration.hf import load_text_model
from lrq.calibration.simulate import TOKENS
from lrq.calibration.stats import SIMULATED, save_stats
from lrq.checkpoint.header import Entry
from lrq.checkpoint.reader import Reader
from lrq.checkpoint.target import check_targets, target_of
from lrq.errors import InputError, counted, listed, printable
from lrq.models.policy import FLOAT_DTYPES, SUFFIX
from lrq.selection.simulated import NORMS, SimulatedInputs

BATCH = 16
"""Texts that run together."""


@dataclass(frozen=True)
class Calibrated:
    """What was written."""

    path: Path
    layers: int
    tokens: int
    notices: list[str] = field(default_factory=list)


def calibrate(
    folder: str | os.PathLike[str],
    texts: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> Calibrated:
    """Run a text model of a Hugging Face folder over the lines of a file, and save what its layers saw.

    Args:
        folder: config, tokenizer and weights, as ``save_pretrained`` lays them out.
        texts: UTF-8, one text a line.
        max_tokens: stop after so many; padding does not count.

    Raises:
        InputError: transformers is not installed, or a file is not what it should be.
    """
    target = target_of(output)
    check_targets([target], [texts, *Path(folder).glob("*.safetensors")])
    lines = _lines(Path(texts))
    with Reader(folder) as reader:
        experts = [entry.name for entry in reader.entries.values() if _is_expert(entry)]
        keys = {*experts, *(entry.name for entry in reader.entries.values() if entry.name.endswith(SUFFIX))}
    text = load_text_model(Path(folder), device)
    tokens, together, padded = 0, BATCH if text.pads else 1, False
    with collect(text.model, keys=text.keys(keys)) as inputs, torch.inference_mode():
        while (max_tokens is None or tokens < max_tokens) and (some := list(islice(lines, together))):
            batch = text.encode(some, device)
            mask = batch["attention_mask"].bool()
            padded |= not bool(mask.all())
            if max_tokens is not None:
                mask &= mask.flatten().cumsum(0).view_as(mask) <= max_tokens - tokens
            inputs.mask = mask
            text.run(batch)
            tokens += int(mask.sum())
            on_batch(tokens)
    inputs.save(target, model=Path(folder).resolve().name, tokens=str(tokens))
    notices = [f"modules were matched {inputs.rule}"] if inputs.rule.strip or inputs.rule.add else []
    notices += _listed("not in the checkpoint:", inputs.unmatched) + _listed("saw no input:", inputs.unseen)
    notices += (
        [f"of the second moments of experts, which are many, {inputs.reduced} are kept"] if inputs.reduced else []
    )
    notices += [f"experts of {printable(name)} are not collected: {why}" for name, why in inputs.refused.items()]
    notices += _listed("counted with padding, which the mask does not fit:", inputs.unmasked if padded else [])
    blind = {name.removesuffix(SUFFIX) for name in experts}.difference(inputs.seen, inputs.unseen)
    notices += _listed("of experts have no statistics:", sorted(blind))
    return Calibrated(target, len(inputs.seen), tokens, notices)


def _is_expert(entry: Entry) -> bool:
    """Whether a tensor is a layer of an expert, or of all experts together, whose name may end without ``.weight``."""
    together = len(entry.shape) == 3 and entry.dtype in FLOAT_DTYPES
    return "experts." in entry.name and (together or (len(entry.shape) == 2 and entry.name.endswith(SUFFIX)))


def _lines(path: Path) -> Iterator[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text, one text a line") from None
    if not lines:
        raise InputError(f"{path}: holds no text; it must have one a line")
    return iter(lines)


def simulate(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    kind: str = NORMS,
    tokens: int = TOKENS,
    lora: str | None = None,
) -> Calibrated:
    """Save what a checkpoint says of its layers' inputs without a run (:class:`SimulatedInputs`).

    Args:
        kind: ``norms`` or ``gaussian``.
        tokens: that many are taken to have been seen: the more, the larger the largest.
        lora: a LoRA of the model, whose A matrices show directions that count.

    Raises:
        InputError: nothing is known of any layer, or a file that can't be read.
    """
    target = target_of(output)
    with Reader(source) as reader:
        check_targets([target], [*reader.files, lora])
        found = SimulatedInputs(reader, kind, tokens, lora)
        if not found:
            raise InputError(f"{source}: no layer stands behind a norm with gains; --simulate has nothing to go by")
        save_stats(target, found, SIMULATED, model=Path(source).name)
        linear = [
            entry.name.removesuffix(SUFFIX)
            for entry in reader.entries.values()
            if entry.name.endswith(SUFFIX) and len(entry.shape) == 2
        ]
        others = sorted(set(linear) - set(found))
        return Calibrated(target, len(found), 0, _listed("of which nothing is known:", others))


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{counted(len(names), 'layer')} {what} {listed(names)}"]
