"""The one configuration: the CLI, the Python call and the provenance in the output are views of these dataclasses.

Every field carries its meaning beside its default; ``cli.options`` builds the flags from the same fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any

from lrq.config.calibration import Calibration
from lrq.errors import InputError
from lrq.settings import check_ranges
from lrq.settings import setting as _setting


@dataclass(frozen=True)
class Storage:
    """The format in the file."""

    int8: bool = _setting(False, "INT8.")
    nvfp4: bool = _setting(False, "NVFP4: 4-bit E2M1 with block scales. The default is FP8 E4M3.")
    mxfp8: bool = _setting(False, "MXFP8: E4M3 with power-of-two block scales.")
    scaling_mode: str | None = _setting(
        None, "What shares one scale, for FP8 and INT8 [default: tensor].", choices=("tensor", "row", "block")
    )
    block_size: int | None = _setting(
        None,
        "Side of the square block of block scaling [default: 64 for FP8, 128 for INT8]; alone, with --int8, it "
        "means --scaling_mode block.",
        minimum=1,
    )
    convrot: bool = _setting(False, "Rotate groups of input columns by a Hadamard matrix first (INT8 row).")
    convrot_group_size: int | None = _setting(
        None, "Columns of a group, a power of 4 [default: 256, or 64 where K is not a multiple of 256].", minimum=4
    )
    full_precision_matrix_mult: bool = _setting(
        False,
        "Mark the layers so that the loader multiplies in 16 bits: for GPUs or layers that lose too much otherwise.",
    )
    comfy_quant: bool = _setting(
        True, "Write ComfyUI's markers; lrq always does, the flag is there for existing command lines."
    )

    @property
    def family(self) -> str:
        """``fp8``, ``int8``, ``nvfp4`` or ``mxfp8``."""
        chosen = [name for name in ("int8", "nvfp4", "mxfp8") if getattr(self, name)]
        return chosen[0] if chosen else "fp8"

    @property
    def scaling(self) -> str:
        """``tensor``, ``row`` or ``block``, with the defaults filled in."""
        if self.scaling_mode is None:
            return "block" if self.family == "int8" and self.block_size is not None else "tensor"
        return self.scaling_mode

    def check(self) -> None:
        """Raise :class:`InputError` for a combination that has no meaning."""
        chosen = [f"--{name}" for name in ("int8", "nvfp4", "mxfp8") if getattr(self, name)]
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)}: choose one format")
        if self.family in ("nvfp4", "mxfp8"):
            own = {"nvfp4": 16, "mxfp8": 32}[self.family]
            if self.scaling_mode is not None:
                raise InputError(f"--scaling_mode: --{self.family} has its own blocks of {own}; leave the option away")
            if self.block_size not in (None, own):
                raise InputError(f"--block_size: --{self.family} has blocks of {own}, not {self.block_size}")
        elif self.block_size is not None and self.scaling != "block":
            raise InputError(f"--block_size {self.block_size}: needs --scaling_mode block, not {self.scaling}")
        if not self.comfy_quant:
            raise InputError("--comfy_quant: can't be off; every loader finds the layers by these markers")
        self._check_convrot()

    def _check_convrot(self) -> None:
        group = self.convrot_group_size
        if self.convrot and (self.family, self.scaling) != ("int8", "row"):
            raise InputError("--convrot: rotates INT8 with one scale a row only; add --int8 --scaling_mode row")
        if group is not None and not self.convrot:
            raise InputError("--convrot_group_size: has no meaning without --convrot")
        if group is not None and (group < 4 or group & (group - 1) or group.bit_length() % 2 == 0):
            raise InputError(f"--convrot_group_size: must be a power of 4 (4, 16, 64, 256, 1024), got {group}")


@dataclass(frozen=True)
class Rounding:
    """How the codes are chosen."""

    simple: bool = _setting(False, "Round to nearest, with the best scales; no learned rounding.")
    scale_search: bool = _setting(
        True,
        "Search the best block scales of NVFP4, the better of two of MXFP8; off: from each block's amax.",
        on_off=True,
    )
    coherence: float = _setting(
        4.0,
        "γ of the scale search: a block's scale minimises |E|² + γ⟨E,W⟩²/|W|². 0: plain least squares.",
        minimum=0.0,
        maximum=1e6,
    )
    optimizer: str | None = _setting(
        None,
        "What chooses the codes: discrete and coordinate_descent move weights on the grid, gptq rounds column by "
        "column under --calib; original (gradient descent), adamw and radam move a relaxation, whose codes count "
        "[default: gptq for layers whose second moments --calib has, else discrete].",
        choices=("discrete", "coordinate_descent", "gptq", "original", "adamw", "radam"),
    )
    num_iter: int = _setting(1000, "Most iterations of learned rounding; it stops when the error rests.", minimum=1)
    lr: float = _setting(0.05, "Learning rate of a relaxation, in steps of the grid.", minimum=0.0, maximum=1e6)
    lr_schedule: str = _setting(
        "adaptive",
        "How the learning rate changes: with each iteration's success, by a constant factor, or when it stalls.",
        choices=("adaptive", "exponential", "plateau"),
    )
    top_p: float | None = _setting(
        None,
        "Share of the weight's singular directions whose error counts extra [default: 0.4; 0.05 for INT8 by row].",
        minimum=0.0,
        maximum=1.0,
    )
    min_k: int = _setting(64, "Fewest directions.", minimum=1)
    max_k: int = _setting(1280, "Most directions.", minimum=1)
    projection: str = _setting(
        "input", "Sides whose leading directions count extra: the inputs', or both.", choices=("input", "both")
    )
    plain_weight: float | None = _setting(
        None,
        "λ, the weight of the plain error [default: 3; 1.5 for FP8 and MXFP8, 0.8 for INT8 by row].",
        minimum=0.0,
        maximum=1e6,
    )
    spectrum: float | None = _setting(
        None,
        "p: an input direction of singular value σ counts as σ^p [default: 1; 0.5 for FP8 and MXFP8, 0.75 for "
        "INT8 by row; 0 with --projection both].",
        minimum=0.0,
        maximum=8.0,
    )
    scale_rounds: int = _setting(
        0, "Rounds of block scales (NVFP4, MXFP8) for the chosen codes, and codes again; for both sides.", minimum=0
    )

    def check(self) -> None:
        """Raise :class:`InputError` for a combination that has no meaning."""
        if self.min_k > self.max_k:
            raise InputError(f"--max_k {self.max_k}: must not be below --min_k {self.min_k}; lower both")


@dataclass(frozen=True)
class Selection:
    """Which layers are quantized, and which of them in another format."""

    preset: tuple = _setting((), "Presets by name, or as tables read from files; none: recognised.", flag=False)
    exclude_layers: tuple = _setting(
        (),
        "Regular expression; layers whose name it finds keep their precision. Given again, it excludes those as well.",
        metavar="REGEX",
        multiple=True,
    )
    fallback: str | None = _setting(
        None,
        "Format of layers that are excluded, by a preset or --exclude_layers; bfloat16: 16 bits instead of 32 "
        "[default: as they are].",
        metavar="TYPE",
    )
    custom_layers: tuple = _setting(
        (),
        "Regular expression; layers whose name it finds are stored as --custom_type. Given again, those as well.",
        metavar="REGEX",
        multiple=True,
    )
    custom_type: str | None = _setting(
        None, "Format of --custom_layers: fp8, fp8-row, int8, int8-row, nvfp4, mxfp8, bfloat16, ...", metavar="TYPE"
    )
    layer_config: dict | None = _setting(None, "Formats by regular expression.", flag=False)  # noqa: RUF009
    fullmatch: bool = _setting(False, "Regular expressions must match the whole name of a layer.")
    heur: bool = _setting(
        False, "Skip layers that gain little or lose much: too small, no fast matmul, thin, or with errors out of line."
    )
    max_error: float | None = _setting(
        None,
        "Widen the format of a layer whose error |Ŵ − W|/|W| exceeds this: NVFP4 to MXFP8, then to the source's.",
        minimum=0.0,
    )
    target_bits: float | None = _setting(
        None,
        "Bits a weight of the quantized layers, with scales: NVFP4, FP8, MXFP8, bfloat16 or the source's own by layer, "
        "so that the summed error is least.",
        minimum=1.0,
        maximum=64.0,
    )
    layers: dict | None = _setting(None, "Decisions by exact name, above all rules.", flag=False)  # noqa: RUF009

    def __post_init__(self) -> None:
        # One expression stands for itself, and JSON has lists.
        for name in ("exclude_layers", "custom_layers"):
            value = getattr(self, name)
            if value is None or isinstance(value, str | list):
                texts = (value,) if isinstance(value, str) else tuple(value or ())
                object.__setattr__(self, name, texts)

    def check(self) -> None:
        """Raise :class:`InputError` for a combination that has no meaning."""
        for name in ("exclude_layers", "custom_layers"):
            wrong = next((text for text in getattr(self, name) if not isinstance(text, str)), None)
            if wrong is not None:
                raise InputError(f"--{name}: must be a regular expression, got {wrong!r}")
        if bool(self.custom_layers) != (self.custom_type is not None):
            given, missing = ("layers", "type") if self.custom_type is None else ("type", "layers")
            raise InputError(f"--custom_{given}: needs --custom_{missing} as well")
        if self.target_bits is not None and self.max_error is not None:
            raise InputError("--target_bits: decides on formats by itself; leave --max_error away")


_OF_SEARCH = ("scale_search", "coherence")
_RELAXATIONS, _OF_RELAXATION = ("original", "adamw", "radam"), ("lr", "lr_schedule")
_OF_LEARNING = (
    *("optimizer", "num_iter", *_OF_RELAXATION, "top_p", "min_k", "max_k"),
    *("projection", "plain_weight", "spectrum", "scale_rounds", "seed"),
)


@dataclass(frozen=True)
class Conversion:
    """Everything that decides the bytes of the output, besides the source."""

    storage: Storage = field(default_factory=Storage)
    rounding: Rounding = field(default_factory=Rounding)
    selection: Selection = field(default_factory=Selection)
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = _setting(0, "Seed of the choices of learned rounding.", minimum=0)

    def check(self) -> None:
        """Raise :class:`InputError` for values or combinations that have no meaning."""
        for part in (self.storage, self.rounding, self.selection, self.calibration):
            check_ranges(part)
            part.check()
        check_ranges(self)
        if self.rounding.optimizer == "gptq" and self.calibration.calib is None and self.calibration.simulate is None:
            raise InputError("--optimizer gptq: needs the statistics of --calib; lrq calibrate makes them")
        other = replace(self.storage, nvfp4=False, full_precision_matrix_mult=False) != Storage()
        if self.selection.target_bits is not None and other:
            raise InputError("--target_bits: chooses NVFP4, FP8, MXFP8 or bfloat16 by itself; leave other formats away")

    def settings(self) -> dict[str, Any]:
        """The flat view: every flag by its name."""
        flat = dataclasses.asdict(self)
        parts = [flat.pop(part.__name__.lower()) for part in PARTS]
        return {name: value for part in (*parts, flat) for name, value in part.items()}

    def without_effect(self) -> list[str]:
        """One line for every setting that was changed, and changes nothing beside the others."""
        default = Conversion().settings()
        changed = {name for name, value in self.settings().items() if value != default[name]}
        family = self.storage.family
        searches, solver = family in ("nvfp4", "mxfp8"), self.rounding.optimizer or "discrete"
        reasons = {
            **({} if searches else dict.fromkeys(_OF_SEARCH, f"{family.upper()} has no block scales to search")),
            **({"coherence": "--scale_search off"} if searches and not self.rounding.scale_search else {}),
            **({} if solver in _RELAXATIONS else dict.fromkeys(_OF_RELAXATION, f"--optimizer {solver}")),
            **(dict.fromkeys(_OF_LEARNING, "--simple") if self.rounding.simple else {}),
            **({"bias_correction": "there is no --calib"} if self.calibration.calib is None else {}),
            **({} if self.calibration.simulate else {"calib_samples": "there is no --simulate"}),
            **({} if self.calibration.actcal else {"actcal_percentile": "there is no --actcal"}),
        }
        return [f"--{name} has no effect: {reasons[name]}" for name in sorted(changed & reasons.keys())]

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Conversion:
        """The inverse of :meth:`settings`; what is absent takes its default.

        Raises:
            InputError: an unknown name, or a value out of range.
        """
        names = {part: {f.name for f in dataclasses.fields(part)} for part in (*PARTS, cls)}
        known = set().union(*names.values()) - {part.__name__.lower() for part in PARTS}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise InputError(f"{unknown[0]}: no such setting; known are {', '.join(sorted(known))}")
        if isinstance(settings.get("preset"), list):
            settings = {**settings, "preset": tuple(settings["preset"])}
        parts = {part: {k: v for k, v in settings.items() if k in names[part]} for part in names}
        made = {part.__name__.lower(): part(**_with_floats(part, parts[part])) for part in PARTS}
        conversion = cls(**made, **parts[cls])
        conversion.check()
        return conversion


def _with_floats(part: type, values: dict[str, Any]) -> dict[str, Any]:
    """10 is 10.0 where the field is a float: the same settings are the same bytes in the file."""
    floats = {field.name for field in dataclasses.fields(part) if str(field.type).startswith("float")}
    # What is larger has no float, and no meaning.
    whole = {name: value for name, value in values.items() if type(value) is int and abs(value) < 1 << 53}
    return values | {name: float(value) for name, value in whole.items() if name in floats}


PARTS: tuple[type, ...] = (Storage, Rounding, Selection, Calibration)
"""What a conversion is made of."""
