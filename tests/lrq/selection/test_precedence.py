"""Who decides on a layer: docs/FORMATS.md, section 5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import inventories
import lrq
from checkpoints import LAYERS, load, normal, run, save, transformer
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.plan import make_plan
from lrq.report.notices import notices
from lrq.selection.expression import Expression, Names

MODULATION, ATTENTION = "double_blocks.0.img_mod.lin", "double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return inventories.sparse(tmp_path_factory.mktemp("flux") / "in.safetensors", inventories.tensors("flux1_dev"))


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tmp_path / "in.safetensors", transformer())


def chosen(source: Path, **settings: object) -> dict[str, str]:
    """Format by layer."""
    with Reader(source) as reader:
        return {layer.name: layer.format.name for layer in make_plan(reader, made(**settings)).layers}


def made(**settings: object) -> Conversion:
    return Conversion.from_settings(settings)


def said(source: Path, **settings: object) -> list[str]:
    with Reader(source) as reader:
        return [one for one in notices(make_plan(reader, made(**settings)), made(**settings)) if "comes first" in one]


@pytest.mark.parametrize("default", [{"format": "nvfp4"}, {"simple": True}, {"full_precision_matrix_mult": True}])
def test_the_default_leaves_the_formats_of_a_preset_in_force(flux, default):
    by_flag = chosen(flux, nvfp4=True)
    assert (by_flag[MODULATION], by_flag[ATTENTION]) == ("fp8", "nvfp4")
    for run_format in ({}, {"nvfp4": True}) if "format" in default else ({"nvfp4": True},):
        assert chosen(flux, layer_config={"_default": default}, **run_format) == by_flag


def test_the_default_says_the_rest_of_what_presets_choose(flux):
    with Reader(flux) as reader:
        default = {"format": "nvfp4", "simple": True, "full_precision_matrix_mult": True}
        plan = make_plan(reader, made(layer_config={"_default": default}))
    layer = next(layer for layer in plan.layers if layer.name == MODULATION)
    assert layer.format.name == "fp8" and layer.simple and layer.full_precision and "modulation" in layer.why
    assert chosen(flux, layer_config={"_default": {"format": "int8"}}, nvfp4=True)[MODULATION] == "int8-tensor"


def test_a_default_that_skips_leaves_nothing_to_a_preset(flux):
    config = {"_default": {"skip": True}, "img_attn": {"format": "fp8"}}
    assert chosen(flux, nvfp4=True, layer_config=config).keys() == {
        f"double_blocks.{i}.img_attn.{part}" for i in range(19) for part in ("qkv", "proj")
    }


def test_from_the_top(flux):
    """Every setting takes away from those below it."""
    layers = {ATTENTION: {"format": "int8-row"}}
    exclude, custom = ("img_attn",), {"custom_layers": "img_(attn|mod)", "custom_type": "int8"}
    config = {"_default": {"format": "mxfp8"}, "img_": {"format": "fp8-row"}, "final": {"format": "fp8"}}
    assert MODULATION in chosen(flux, nvfp4=True)
    rules = {"exclude_layers": exclude, **custom, "layer_config": config}
    found = chosen(flux, nvfp4=True, layers=layers, **rules)
    assert found[ATTENTION] == "int8-row" and "double_blocks.1.img_attn.qkv" not in found
    assert found[MODULATION] == "int8-tensor" and found["double_blocks.0.img_mlp.0"] == "fp8-row"
    # What a preset keeps, a rule of the file overrides and the default does not.
    assert found["final_layer.linear"] == "fp8" and "time_in.in_layer" not in found
    assert found["double_blocks.0.txt_attn.qkv"] == "mxfp8" == found["double_blocks.0.txt_mod.lin"]
    assert chosen(flux, nvfp4=True, fallback="int8", **rules)["double_blocks.1.img_attn.qkv"] == "int8-tensor"


def test_heur_is_above_the_default_and_the_formats_of_presets(flux):
    config = {"_default": {"format": "fp8-row"}}
    assert ATTENTION in chosen(flux, layer_config=config)
    with Reader(flux) as reader:
        kept = make_plan(reader, made(layer_config=config, heur=True), allow_empty=True)
    assert not kept.layers and "no fast matmul" in kept.kept[f"{ATTENTION}.weight"]


SPELLED = {
    "attn": 4,
    "(?P<averylongname>attn)": 4,
    "(?#a long comment)attn": 4,
    "attn|zzzzzzzzzzzz": 4,
    r"attn\.qkv": 8,
    "(?:abc)?d": 1,
    "(?:abc){2}d{0,9}": 6,
    "a*b+": 1,
    "[qkv]_proj": 6,
    "(?:q|k|v)_proj": 6,
    r"[^.]\d.\w[a-z]x": 1,
    "(?=attn)(?<!x)q": 1,
    r"(attn)\1": 4,
    "(?i)attn": 4,
    r"\p{L}+attn": 4,
    "(?i:attn)": 4,
    "": 0,
    "(?|attn|qkv)": 0,
    "attn{e<=1}": 0,
    "[[:alpha:]]attn": 0,
}


@pytest.mark.parametrize("text", SPELLED)
def test_what_counts_is_what_names_must_hold(text):
    assert Expression(text, "x").literals == SPELLED[text]


@pytest.mark.parametrize(
    "wordy", ["(?P<averylongname>attn)", "(?#a long comment)attn", "attn|zzzzzzzzzzzz", "[qkvattn]+"]
)
def test_syntax_makes_no_rule_more_specific(source, wordy):
    config = {r"attn\.qkv": {"format": "nvfp4"}, wordy: {"format": "mxfp8"}}
    assert chosen(source, layer_config=config)[LAYERS[0]] == "nvfp4"


NAMES = [
    "blocks.0.attn",
    "blocks.1.attn",
    "blocks.10.attn",
    "blocks.12.fc1",
    "blocks.1.fc.12",
    "1",
    "12",
    "x1.attn",
    "1x.12.a",
    "a\n1",
    "blocks.٣.attn",
    "blocks.0.attn\n",
    "Attn{e}",
    "ab[:alpha]",
]
TEXTS = [
    *SPELLED,
    r"\d+",
    r"\d\d",
    r"blocks\.\d+\.attn",
    r"\.\d+$",
    r"^\d+",
    r"\d+.*\d+",
    "blocks.*attn$",
    ".+.+",
    "1",
    r"^1\.",
]
TEXTS += [r"^blocks\.0\.attn$", r"(?m)^blocks\.0\.attn$", r"(?i)^BLOCKS\.0\.attn$", "^1$", "^$", "0.attn|1.attn|12"]
TEXTS += [
    r"(?a)\d+",
    r"\.(\d+|fc)",
    "[0-4]",
    "[^b]",
    "(?s).*1",
    "attn|fc",
    r"\b1",
    r"\d+x",
    "(?i)ATTN",
    "(?:0|1)",
    "^.$",
    r"..\.a",
]


@pytest.mark.parametrize("fullmatch", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_left_untried_would_not_have_been_found(text, fullmatch):
    expression = Expression(text, "x", fullmatch)
    assert set(expression.among(Names(NAMES))) == {name for name in NAMES if expression.finds(name)}


def test_a_rule_without_effect_is_named_with_the_one_that_comes_first(tmp_path, source):
    config = {"attn": {"format": "nvfp4"}, "blocks": {"format": "mxfp8"}}
    assert set(chosen(source, layer_config=config).values()) == {"mxfp8"}
    words = "'attn' has no effect: --layer_config: 'blocks' comes first on every layer that it finds"
    assert said(source, layer_config=config) == [f"--layer_config: {words}"]
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(config))
    assert "line 1: 'attn' has no effect: " in run("plan", source, "--layer_config", rules).stdout
    summary = lrq.quantize(source, tmp_path / "out", simple=True, layer_config=config)
    assert any("'attn' has no effect" in notice for notice in summary.notices)


def test_only_rules_that_are_outdone_everywhere_are_named(source):
    partly = {"attn": {"format": "nvfp4"}, r"blocks\.0\.attn": {"format": "mxfp8"}}
    alike = {"attn": {"format": "nvfp4"}, "blocks": {"format": "nvfp4"}}
    assert not said(source, layer_config=partly) and not said(source, layer_config=alike)
    assert not said(source, exclude_layers=("attn", "qkv"))
    (one,) = said(source, exclude_layers=("attn",), layer_config={"qkv": {"format": "fp8"}})
    assert "'qkv' has no effect: --exclude_layers attn comes first" in one
    several = {f"{block}": {"format": "fp8"} for block in (r"blocks\.0\.attn", r"blocks\.1\.attn")}
    (one,) = said(source, layer_config={**several, "attn": {"format": "nvfp4"}})
    assert "'attn' has no effect" in one and " and 1 more comes first" in one


def test_every_expression_is_checked_by_itself(source):
    def plan(*flags: str) -> tuple[int, str]:
        result = run("plan", source, *flags)
        return result.exit_code, result.stderr

    assert plan("--exclude_layers", "attn", "--exclude_layers", "fc")[0] == 2
    for flag, more in (("--exclude_layers", ()), ("--custom_layers", ("--custom_type", "int8"))):
        code, words = plan(flag, "attn", flag, "nothere", *more)
        assert code == 2 and words.startswith(f"error: {flag} nothere: finds no layer"), words
        code, words = plan(flag, "attn)|(", flag, "fc", *more)
        assert code == 2 and words.startswith(f"error: {flag} attn)|(: not a regular expression"), words
        code, words = plan(flag, "(a)ttn", flag, r"(b)locks\.0.*\1|(.)\2", *more)
        assert code == 0, words
    code, words = plan("--exclude_layers", "(c)1$", "--exclude_layers", r"(.)\1")
    assert code == 2 and words.startswith("error: --exclude_layers (c)1$: finds no layer"), words


def test_expressions_come_alone_or_many(tmp_path):
    source = save(tmp_path / "in", {f"{name}.weight": normal(32, 32) for name in ("a", "b", "c")})
    for given in ("a", ["a"], ("a",)):
        assert chosen(source, exclude_layers=given).keys() == {"b", "c"}
    assert chosen(source, exclude_layers=["a", "b"]).keys() == {"c"}
    assert chosen(source, custom_layers=["a", "b"], custom_type="int8") == dict(
        a="int8-tensor", b="int8-tensor", c="fp8"
    )
    lrq.quantize(source, tmp_path / "one", simple=True, exclude_layers=["a", "b"])
    settings = json.loads(load(tmp_path / "one").metadata["lrq"])["settings"]
    assert settings["exclude_layers"] == ["a", "b"]
    lrq.quantize(source, tmp_path / "two", **settings)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with pytest.raises(lrq.errors.InputError, match="--exclude_layers: must be a regular expression, got 5"):
        chosen(source, exclude_layers=["a", 5])
