"""What is made of statistics of the layers' inputs."""

from __future__ import annotations

from dataclasses import dataclass

from lrq.errors import InputError
from lrq.settings import setting as _setting

PERCENTILES = (50.0, 100.0)
"""Of the inputs' magnitudes: from the least that makes sense to the largest input."""


@dataclass(frozen=True)
class Calibration:
    """What is made of statistics of the layers' inputs."""

    calib: str | None = _setting(
        None, "Statistics of the layers' inputs (lrq calibrate): codes and block scales follow them.", metavar="FILE"
    )
    simulate: str | None = _setting(
        None,
        "Statistics without a run: what the model's norms and activations give, or standard normal inputs. They shape "
        "the rounding and --actcal, never a bias.",
        choices=("norms", "gaussian"),
    )
    calib_samples: int = _setting(
        64,
        "Tokens that --simulate stands for: the more, the larger the largest input.",
        minimum=1,
        maximum=1_000_000_000,
        aliases=("actcal_samples",),
    )
    actcal_lora: str | None = _setting(
        None, "A LoRA of the model: under --simulate, what it reads counts more.", metavar="FILE"
    )
    bias_correction: bool = _setting(
        True, "With measured statistics: b - (Ŵ - W)μ, so that the mean of every output stays.", on_off=True
    )
    add_bias: bool = _setting(False, "Give layers without a bias one that holds the correction.")
    actcal: bool = _setting(False, "Write input_scale of FP8 and NVFP4 layers, from --calib or --simulate.")
    actcal_percentile: float = _setting(
        100.0,
        "Percent of the inputs' magnitudes that must not clip; 100: the largest.",
        minimum=PERCENTILES[0],
        maximum=PERCENTILES[1],
    )
    input_scales: str | None = _setting(
        None, "Take input_scale from this JSON file or checkpoint; wins over --actcal.", metavar="FILE"
    )

    def check(self) -> None:
        """Raise :class:`InputError` for a combination that has no meaning."""
        if self.calib is not None and self.simulate is not None:
            raise InputError("--simulate: stands in the place of --calib; leave one of them away")
        if self.actcal and self.calib is None and self.simulate is None:
            raise InputError(
                "--actcal: needs the statistics of --calib, or --simulate gaussian or norms, whose guess may clip real "
                "inputs"
            )
        if self.add_bias and self.calib is None:
            raise InputError("--add_bias: needs the statistics of --calib")
        if self.actcal_lora is not None and self.simulate is None:
            raise InputError("--actcal_lora: needs --simulate norms or gaussian")
        if self.add_bias and not self.bias_correction:
            raise InputError("--add_bias: has no meaning with --bias_correction off")
