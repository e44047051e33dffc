"""``lrq calibrate`` and ``lrq actscale``."""

from __future__ import annotations

import click

from lrq.cli.options import DashCommand
from lrq.config.calibration import PERCENTILES
from lrq.errors import InputError, counted, printable

CONTEXT = {"help_option_names": ["-h", "--help"]}


@click.command(cls=DashCommand, context_settings=CONTEXT)
@click.option("--hf", metavar="DIR", help="A Hugging Face folder of a text model: weights, config, tokenizer.")
@click.option("--texts", metavar="FILE", help="Texts for --hf, one a line, UTF-8.")
@click.option("--simulate", metavar="IN", help="A checkpoint: statistics without a run, which move no bias.")
@click.option(
    "--inputs",
    type=click.Choice(["norms", "gaussian"]),
    help="For --simulate: what norms and activations give, or standard normal numbers  [default: norms]",
)
@click.option(
    "--calib_samples",
    type=click.IntRange(1, 1_000_000_000),
    help="For --simulate: tokens that were seen [default: 64].",
)
@click.option("--actcal_lora", metavar="FILE", help="For --simulate: a LoRA of the model; what it reads counts more.")
@click.option("-o", "--output", required=True, metavar="FILE", help="The file of statistics to write.")
@click.option("--max_tokens", type=click.IntRange(min=1), help="Tokens at most [default: all].")
@click.option("--device", default="auto", show_default=True, help="Where to run the model: auto, cpu, cuda, ...")
def calibrate(
    hf: str | None,
    texts: str | None,
    simulate: str | None,
    inputs: str | None,
    calib_samples: int | None,
    actcal_lora: str | None,
    output: str,
    max_tokens: int | None,
    device: str,
) -> None:
    """Collect statistics of the layers' inputs, for convert --calib.

    \b
    Example:
      lrq calibrate --hf all-MiniLM-L6-v2 --texts sentences.txt -o stats.safetensors
      lrq calibrate --simulate model.safetensors --actcal_lora lora.safetensors -o stats.safetensors
    """
    from lrq.cli.main import guarded

    def work() -> None:
        if (hf is None) == (simulate is None):
            raise InputError("calibrate: needs either --hf DIR with --texts FILE, or --simulate IN")
        if hf is not None and texts is None:
            raise InputError("--hf: needs --texts FILE as well")
        if simulate is not None and (texts is not None or max_tokens is not None):
            raise InputError("--simulate: runs no text; leave --texts and --max_tokens away")
        for flag, value in (("inputs", inputs), ("calib_samples", calib_samples), ("actcal_lora", actcal_lora)):
            if simulate is None and value is not None:
                raise InputError(f"--{flag}: is of --simulate; --hf runs on real texts")
        from lrq import calibrate as calibration
        from lrq.calibration.simulate import TOKENS
        from lrq.run import choose_device

        if simulate is not None:
            many = calib_samples or TOKENS
            done = calibration.simulate(simulate, output, kind=inputs or "norms", tokens=many, lora=actcal_lora)
        else:
            done = calibration.calibrate(
                str(hf), str(texts), output, max_tokens=max_tokens, device=choose_device(device)
            )
        for notice in done.notices:
            click.echo(f"notice: {notice}", err=True)
        tokens = f" of {done.tokens} tokens" if done.tokens else ", simulated"
        click.echo(f"{printable(str(done.path))}: inputs of {counted(done.layers, 'layer')}{tokens}", err=True)

    guarded(work)


@click.command(cls=DashCommand, context_settings=CONTEXT)
@click.argument("source", metavar="FILE")
@click.option("--calib", metavar="STATS", help="Statistics of the layers' inputs (lrq calibrate).")
@click.option("--input_scales", metavar="FILE", help="JSON or checkpoint that holds the scales; wins over --calib.")
@click.option(
    "--actcal_percentile",
    type=click.FloatRange(*PERCENTILES),
    default=100.0,
    show_default=True,
    help="Share of the inputs' magnitudes, in percent, that must not clip.",
)
@click.option("-o", "--output", required=True, metavar="FILE", help="The file to write.")
def actscale(source: str, calib: str | None, input_scales: str | None, actcal_percentile: float, output: str) -> None:
    """Give the FP8 and NVFP4 layers of a quantized FILE an input_scale; all other tensors stay as they are.

    \b
    Example:
      lrq actscale model-fp8.safetensors --calib stats.safetensors -o model-fp8-static.safetensors
    """
    from lrq.cli.main import guarded

    def work() -> None:
        if calib is None and input_scales is None:
            raise InputError("actscale: needs --calib STATS or --input_scales FILE")
        from lrq.actscale import patch_input_scales

        done = patch_input_scales(source, output, calib=calib, input_scales=input_scales, percentile=actcal_percentile)
        for notice in done.notices:
            click.echo(f"notice: {notice}", err=True)
        scales = counted(len(done.scales), "input scale")
        click.echo(f"{printable(str(done.path))}: {scales}, the rest as it was", err=True)

    guarded(work)
