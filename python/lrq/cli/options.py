"""Flags made from the fields of the configuration."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from collections.abc import Callable
from typing import IO, Any

import click

from lrq.config import PARTS, Conversion
from lrq.errors import printable
from lrq.execution import Execution
from lrq.models.preset import by_flag, presets

PRESETS = "lrq.presets"
"""Where flags of presets are gathered."""


class AnyCharacter(click.Command):
    """A command whose output stands in any encoding: what the terminal can't hold is escaped."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)


class DashCommand(AnyCharacter):
    """A command whose long flags work with dash and underscore alike, and whose usage errors are one line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {name for param in self.params for name in param.opts if name.startswith("--")}
        try:
            return super().parse_args(ctx, [_spelled(arg, known) for arg in args])
        except click.UsageError as error:
            raise _OneLine(error.format_message()) from None


class OneLineGroup(click.Group, AnyCharacter):
    """A group of commands whose usage errors are one line."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise _OneLine(f"{error.format_message()} Commands are {', '.join(self.list_commands(ctx))}") from None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise _OneLine(error.format_message()) from None


class _OneLine(click.UsageError):
    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {printable(self.message.rstrip('.'))}; see --help", file=file, err=True)


def _spelled(arg: str, known: set[str]) -> str:
    found = re.fullmatch(r"(--[^=]+)(=.*)?", arg, re.DOTALL)
    if found is None or found[1] in known:
        return arg
    alike = next((name for name in known if name.replace("-", "_") == found[1].replace("-", "_")), found[1])
    return alike + (found[2] or "")


def execution_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag for every field of the execution."""
    for setting in reversed(dataclasses.fields(Execution)):
        command = _option(setting)(command)
    return command


WITHOUT_EFFECT = {
    "actcal_seed": "simulated inputs are taken in closed form: there is no draw",
    "actcal_device": "there is nothing to run",
}
"""Flags of the manual for which there is no need, and why."""


def _without_effect(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        click.echo(f"notice: {param.opts[0]} has no effect: {WITHOUT_EFFECT[str(param.name)]}", err=True)


def configuration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag for every field of the configuration, and one for every preset."""
    inner = {part.__name__.lower() for part in PARTS}
    for part in (Conversion, *reversed(PARTS)):
        for setting in reversed(dataclasses.fields(part)):
            if setting.name not in inner and setting.metadata.get("flag", True):
                command = _option(setting)(command)
    for name in WITHOUT_EFFECT:
        command = click.option(f"--{name}", expose_value=False, hidden=True, callback=_without_effect, metavar="VALUE")(
            command
        )
    return preset_options(command)


def preset_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--preset``, a flag for every preset, and ``--layer_config``."""
    command = click.option(
        "--layer_config", metavar="FILE", help="JSON: regular expressions of layer names, each with format or skip."
    )(command)
    for name in by_flag():
        command = click.option(f"--{name}", is_flag=True, expose_value=False, hidden=True, callback=_add_preset)(
            command
        )
    known = " ".join(f"--{flag}" for preset in presets().values() for flag in preset.flags[:1])
    return click.option(
        "--preset",
        multiple=True,
        metavar="NAME|FILE|none",
        help="What is known of the model, by name or as a TOML file; several combine [default: recognised]. "
        f"Each is a flag, too: {known}.",
    )(command)


def _add_preset(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta.setdefault(PRESETS, []).append(str(param.opts[0]).removeprefix("--"))


def given_settings(ctx: click.Context, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a command line; presets that were given as flags are among them."""
    return {**settings, "preset": (*settings["preset"], *ctx.meta.get(PRESETS, ()))}


def _option(setting: dataclasses.Field[Any]) -> Callable[..., Any]:
    meta, default = setting.metadata, setting.default
    flag = f"--{setting.name}"
    flags = (flag, *(f"--{alias}" for alias in meta.get("aliases", ())), setting.name)
    if meta.get("on_off"):
        return click.option(
            flag,
            type=click.Choice(["on", "off"]),
            default="on" if default else "off",
            show_default=True,
            help=meta["meaning"],
            callback=lambda ctx, param, value: value == "on",
        )
    if meta.get("multiple"):
        return click.option(flag, multiple=True, metavar=meta["metavar"], help=meta["meaning"])
    if isinstance(default, bool):
        return click.option(flag, is_flag=True, default=default, help=meta["meaning"])
    kind: Any = str
    if "choices" in meta:
        kind = click.Choice(meta["choices"])
    elif "float" in str(setting.type):
        kind = float
    elif "int" in str(setting.type):
        kind = int
    return click.option(
        *flags,
        type=kind,
        default=default,
        show_default=default is not None,
        metavar=meta.get("metavar"),
        help=meta["meaning"],
    )
