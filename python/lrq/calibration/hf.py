"""Text models of Hugging Face folders, loaded to be run over texts: every weight that is used must be in the folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrq.errors import InputError, listed, printable, unstyled

LONGEST = 512
"""Tokens of a text at most."""
TEXT_PARTS = {
    "clip": ("CLIPTextModel", "text_model."),
    "siglip": ("SiglipTextModel", "text_model."),
    "siglip2": ("Siglip2TextModel", "text_model."),
}
"""By the type of a model of images and texts: the class of its text model, and where that is in the checkpoint."""
HEADS = re.compile(r"(?:\w+\.)?(?:pooler|lm_head|classifier|score|qa_outputs|cls|embed_out|text_projection)\.")
"""What stands behind the last layer: whatever its weights are, no input hangs on them."""


@dataclass(frozen=True)
class TextModel:
    """A model, and the part of it that texts alone can run."""

    model: Any
    part: Any
    tokenizer: Any
    longest: int
    prefix: str
    folder: Path

    def keys(self, keys: Collection[str]) -> list[str]:
        """Those of the checkpoint's that are of the model."""
        return [key for key in keys if key.startswith(self.prefix)]

    @property
    def pads(self) -> bool:
        """Whether texts can run together."""
        return self.tokenizer.pad_token is not None

    def encode(self, texts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and what else the model wants.

        Raises:
            InputError: the tokenizer is of another model, or fails.
        """
        with _one_line(f"{self.folder}: the tokenizer fails"):
            batch = self.tokenizer(
                texts, padding=self.pads, truncation=True, max_length=self.longest, return_tensors="pt"
            )
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
            known, largest = self._embeddings(), int(batch["input_ids"].amax())
        if known is not None and largest >= known:
            raise InputError(
                f"{self.folder}: the tokenizer gives token {largest}, but the model has embeddings of {known} tokens; "
                "they are of different models"
            )
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def run(self, batch: dict[str, Tensor]) -> None:
        """Raises InputError if the model fails."""
        try:
            self.part(**batch)
        except (InputError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise InputError(f"{self.folder}: the model can't be run: {_said(error)}") from error

    def _embeddings(self) -> int | None:
        weight = getattr(self.part.get_input_embeddings(), "weight", None)
        return None if weight is None else len(weight)


def load_text_model(folder: Path, device: torch.device | str) -> TextModel:
    """Load config, tokenizer and weights; of an encoder and a decoder the encoder runs.

    Raises:
        InputError: transformers is not installed or can't load it, or weights that are used are not in the checkpoint.
    """
    try:
        import transformers
    except ImportError:
        raise InputError("--hf: needs transformers: pip install transformers tokenizers") from None
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _one_line(f"{folder}: no text model that transformers loads"):
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        kind, prefix = _class_for(transformers, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        # Tensors of another shape are named below; the library would only point to its log.
        loading = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": "auto"}
        model, info = kind.from_pretrained(folder, **loading)
        part = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Behind padding on the left a model that counts places would see each text further on than it begins.
        tokenizer.padding_side = "right"
        places = int(getattr(model.config, "max_position_embeddings", None) or LONGEST)
        # -1, of XLNet, is no limit.
        longest = max(1, min(LONGEST, places if places > 0 else LONGEST, tokenizer.model_max_length))
        model = model.to(device).eval()
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{folder}: has no tokenizer with a vocabulary; copy the model's tokenizer files into it")
    _check_weights(folder, model, part, info)
    return TextModel(model, part, tokenizer, longest, prefix, folder)


def _class_for(transformers: Any, config: Any) -> tuple[Any, str]:
    """The class to load, and the prefix of its keys where the checkpoint has other models as well."""
    names = config.architectures or ()
    if config.model_type in TEXT_PARTS:
        name, prefix = TEXT_PARTS[config.model_type]
        return getattr(transformers, name), prefix
    if any(name.endswith("ForCausalLM") for name in names):
        return transformers.AutoModelForCausalLM, ""
    encoder = getattr(config, "is_encoder_decoder", False) or any(name.endswith("EncoderModel") for name in names)
    if encoder and type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding, ""
    return transformers.AutoModel, ""


def _check_weights(folder: Path, model: Any, part: Any, info: dict[str, Any]) -> None:
    """What the checkpoint does not have was drawn at random, and inputs behind it would be measured of nothing."""
    run = {id(one) for one in part.parameters()}
    used = {name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in run}
    for name, found, wanted in sorted(one for one in info["mismatched_keys"] if one[0] in used):
        shapes = f"{printable(name)} is {list(found)}, config.json says {list(wanted)}"
        raise InputError(f"{folder}: {shapes}; they are of different models")
    missing = sorted(name for name in info["missing_keys"] if name in used and not HEADS.match(name))
    if missing:
        raise InputError(
            f"{folder}: the checkpoint has no {listed(missing)}, which the model of "
            "config.json runs with; inputs can't be measured without them"
        )
    for message in info["error_msgs"]:
        raise InputError(f"{folder}: no text model that transformers loads: {first_line(str(message))}")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever a library raises over a user's files becomes one line."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Inside runs transformers alone, over files of others: tokenizers raise Exception itself.
        raise InputError(f"{what}: {_said(error)}") from error


def _said(error: Exception) -> str:
    line, kind = first_line(str(error)), type(error).__name__
    # A bare key or nothing says little.
    return line if " " in line else f"{kind}: {line}" if line else kind


def first_line(message: str) -> str:
    """Of a library's message, without colours; where it only announces the next line, with that."""
    lines = [" ".join(line.split()) for line in unstyled(message).splitlines() if line.strip()]
    return printable(" ".join(lines[: 2 if lines[0].endswith(":") else 1])) if lines else ""
