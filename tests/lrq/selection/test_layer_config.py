"""Rules of the user's: what they choose, and what is said of wrong ones before anything runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

import lrq
from checkpoints import LAYERS, convert, load, normal, run, same_bytes, save, transformer
from lrq.errors import InputError
from lrq.selection.expression import Expression
from lrq.selection.storage import NAMES


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tmp_path / "in.safetensors", transformer())


def written(folder: Path, rules: object) -> Path:
    path = folder / "rules.json"
    path.write_text(rules if isinstance(rules, str) else json.dumps(rules))
    return path


def formats(path: Path) -> dict[str, str]:
    return {layer: marker["format"] for layer, marker in load(path).stated.items()}


def check(path: Path, source: Path) -> None:
    result = lrq.verify(path, source)
    assert result.ok, result.failures


def test_any_mixture_of_formats_in_one_file(tmp_path, source):
    rules = {
        r"blocks\.0\.attn": {"format": "nvfp4"},
        r"blocks\.1\.attn": {"format": "int8_tensorwise", "convrot": True, "convrot_group_size": 16},
        r"blocks\.0\.mlp": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
        "_default": {"format": "int8_blockwise", "block_size": 8},
    }
    convert(source, tmp_path / "out", "--mxfp8", "--layer-config", written(tmp_path, rules))
    assert load(tmp_path / "out").stated == {
        "blocks.0.attn.qkv": {"format": "nvfp4"},
        "blocks.1.attn.qkv": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
        "blocks.0.mlp.fc": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
        "blocks.1.mlp.fc": {"format": "int8_blockwise", "group_size": 8},
    }
    check(tmp_path / "out", source)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_of_a_format_can_be_asked_for(tmp_path, name):
    source = save(tmp_path / "in", {"a.weight": normal(128, 256), "b.weight": normal(128, 256)})
    convert(source, tmp_path / "out", "--nvfp4", "--layer-config", written(tmp_path, {"a": {"format": name}}))
    assert name in ("nvfp4",) or formats(tmp_path / "out")["a"] != "nvfp4"
    assert formats(tmp_path / "out")["b"] == "nvfp4"
    check(tmp_path / "out", source)


def test_skip_and_comments(tmp_path, source):
    rules = {"_about": "mine", "attn": {"skip": True, "_why": "I say so"}, "fc": {"format": "fp8", "_shape": [1, 2]}}
    convert(source, tmp_path / "out", "--nvfp4", "--layer-config", written(tmp_path, rules))
    assert formats(tmp_path / "out") == dict.fromkeys(LAYERS[1::2], "float8_e4m3fn")


def test_the_pattern_that_spells_out_more_wins_and_of_equals_the_later(tmp_path, source):
    rules = {r"blocks\.0\.mlp\.fc": {"format": "fp8"}, "fc": {"format": "nvfp4"}, "qk": {"format": "int8"}}
    rules["kv"] = {"format": "mxfp8"}
    convert(source, tmp_path / "out", "--layer-config", written(tmp_path, rules))
    assert [formats(tmp_path / "out")[layer] for layer in LAYERS] == ["mxfp8", "float8_e4m3fn", "mxfp8", "nvfp4"]


def test_simple_holds_for_the_layer_alone(tmp_path, source):
    rules = written(tmp_path, {"fc": {"format": "nvfp4", "simple": True}})
    flags = ["--nvfp4", "--num_iter", "20", "--layer-config", rules]
    assert run("convert", "-i", source, "-o", tmp_path / "a", *flags).exit_code == 0
    convert(source, tmp_path / "b", "--nvfp4")
    first, second = load(tmp_path / "a").tensors, load(tmp_path / "b").tensors
    assert same_bytes(first["blocks.0.mlp.fc.weight"], second["blocks.0.mlp.fc.weight"])
    assert not same_bytes(first["blocks.0.attn.qkv.weight"], second["blocks.0.attn.qkv.weight"])
    check(tmp_path / "a", source)


def test_exclusion_wins_over_custom_and_custom_over_the_file(tmp_path, source):
    flags = ["--exclude-layers", r"blocks\.0\.mlp", "--custom-layers", "mlp", "--custom-type", "int8"]
    flags += ["--layer-config", written(tmp_path, {"fc": {"format": "fp8"}, "qkv": {"format": "fp8"}})]
    convert(source, tmp_path / "out", "--nvfp4", *flags)
    assert formats(tmp_path / "out") == {
        "blocks.0.attn.qkv": "float8_e4m3fn",
        "blocks.1.attn.qkv": "float8_e4m3fn",
        "blocks.1.mlp.fc": "int8_tensorwise",
    }


def test_fallback_stores_what_is_excluded_but_no_table(tmp_path):
    tensors = transformer() | {"head.weight": normal(16, 32), "blocks.0.norm9.weight": normal(16, 32)}
    source = save(tmp_path / "in", tensors)
    convert(source, tmp_path / "out", "--nvfp4", "--exclude-layers", "mlp", "--fallback", "fp8")
    found = formats(tmp_path / "out")
    assert {layer for layer, fmt in found.items() if fmt == "float8_e4m3fn"} == {LAYERS[1], LAYERS[3], "head"}
    assert "token_embedding" not in found and "blocks.0.norm9" not in found
    check(tmp_path / "out", source)


def test_full_precision_matrix_mult_marks_every_layer(tmp_path, source):
    convert(source, tmp_path / "out", "--mxfp8", "--full_precision_matrix_mult")
    assert all(marker["full_precision_matrix_mult"] is True for marker in load(tmp_path / "out").marked.values())
    check(tmp_path / "out", source)


def test_fullmatch(tmp_path, source):
    rules = written(tmp_path, {r"blocks\.\d\.mlp\.fc": {"skip": True}})
    convert(source, tmp_path / "out", "--fullmatch", "--layer-config", rules)
    assert formats(tmp_path / "out").keys() == set(LAYERS[::2])
    words = run("convert", "-i", source, "--fullmatch", "--layer-config", written(tmp_path, {"fc": {"skip": True}}))
    assert words.exit_code == 2 and "'fc': finds no layer in" in words.stderr


def test_an_explicit_rule_overrides_what_a_preset_keeps(tmp_path):
    source = save(tmp_path / "in", transformer() | {"head.weight": normal(16, 32)})
    rules = written(tmp_path, {"head": {"format": "fp8"}, "token_embedding": {"format": "int8"}})
    convert(source, tmp_path / "out", "--nvfp4", "--layer-config", rules)
    assert formats(tmp_path / "out")["head"] == "float8_e4m3fn"
    assert formats(tmp_path / "out")["token_embedding"] == "int8_tensorwise"


WRONG = {
    "not json": ('{\n "a": {"format": "fp8"},\n oops\n}', "line 3: not JSON"),
    "empty": ("", "line 1: not JSON"),
    "a list": ("[]", "must be a JSON object"),
    "deep": ("[" * 100_000, "not JSON"),
    "unknown format": ('{\n\n "fc": {"format": "nvfp5"}}', "line 3: 'fc': no such format 'nvfp5'; did you mean nvfp4?"),
    "unknown key": (
        '{"fc":\n {"format": "fp8",\n  "blocksize": 8}}',
        "line 3: 'fc': no such key 'blocksize'",
    ),
    "wrong type": ('{"fc": {"format": "fp8", "skip": "yes"}}', "line 1: 'fc': skip must be bool, got 'yes'"),
    "no object": ('{"fc": "fp8"}', "line 1: 'fc': must be an object"),
    "nothing said": ('{"fc": {}}', "says nothing; give a format"),
    "skip and format": ('{"fc": {"skip": true, "format": "fp8"}}', "format has no meaning beside skip"),
    "group": ('{"fc": {"format": "int8", "convrot": true, "convrot_group_size": 32}}', "must be a power of 4"),
    "blocks of nvfp4": ('{"fc": {"format": "nvfp4", "block_size": 32}}', "nvfp4 has blocks of 16, not 32"),
    "block without": ('{"fc": {"format": "int8_tensorwise", "block_size": 32}}', "int8_tensorwise has no blocks"),
    "scaling": ('{"fc": {"format": "fp8", "scaling_mode": "rows"}}', "did you mean row?"),
    "contradiction": ('{"fc": {"format": "fp8-row", "scaling_mode": "tensor"}}', "fp8-row has scaling_mode row"),
    "expression": ('{\n"f(c": {"format": "fp8"}}', "line 2: 'f(c': not a regular expression: "),
    "no match": ('{\n\n\n"mlp.fd": {"format": "fp8"}}', "line 4: 'mlp.fd': finds no layer in"),
    "only norms": (
        '{"norm1": {"format": "fp8"}}',
        "quantized so (not a matrix of weights)",
    ),
    "only tables": ('{"token": {"format": "nvfp4"}}', "embedding, which can only be fp8 or int8-tensor or int8-row"),
    "twice": ('{"fc": {"format": "fp8"},\n"fc": {"format": "nvfp4"}}', "line 2: 'fc' is given twice"),
    "default": ('{"_default": {"format": "fp9"}}', "'_default': no such format 'fp9'; did you mean fp8?"),
    "misspelt default": (
        '{"_defualt": {"format": "fp8"}}',
        "line 1: '_defualt': is no comment's name; did you mean _default",
    ),
    "default in capitals": (
        '{"_DEFAULT": {"format": "fp8"}}',
        "'_DEFAULT': is no comment's name; did you mean _default",
    ),
    "default in dunders": ('{"__default__": {"format": "fp8"}}', "is no comment's name; did you mean _default"),
    "plural default": ('{"_Defaults": {"format": "fp8"}}', "is no comment's name; did you mean _default"),
    "no blocks": ('{"fc": {"format": "fp8-block", "block_size": 0}}', "block_size: must be at least 1, got 0"),
    "negative": ('{"fc": {"format": "fp8-block", "block_size": -4}}', "block_size: must be at least 1, got -4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_one_line_before_anything_runs(tmp_path, source, name):
    text, words = WRONG[name]
    path = written(tmp_path, text)
    before = {file.name for file in tmp_path.iterdir()}
    result = run("convert", "-i", source, "--layer-config", path)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: --layer_config ") and words in line, line
    assert {file.name for file in tmp_path.iterdir()} == before


def test_the_nearest_layer_is_named(tmp_path, source):
    line = run(
        "convert", "-i", source, "--layer-config", written(tmp_path, {r"blocks\.0\.attn\.qvk": {"skip": True}})
    ).stderr
    assert "the nearest name is blocks.0.attn.qkv" in line


@pytest.mark.parametrize("flag", ["--exclude-layers", "--layer-config"])
def test_a_catastrophic_expression_is_an_error_and_no_hang(tmp_path, flag):
    source = save(tmp_path / "in", {f"{'a' * 60}!.weight": normal(16, 16), "b.weight": normal(16, 16)})
    pattern = r"(?:a|aa|a?)+(?:b|c)*d?(x+x+)+y|(a|a)*(a|a)*(a|a)*$z"
    value = pattern if flag == "--exclude-layers" else written(tmp_path, {pattern: {"skip": True}})
    started = time.monotonic()
    result = run("convert", "-i", source, flag, value)
    assert time.monotonic() - started < 20
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and ("takes over 2 s on names like" in line or "finds no layer" in line)


def test_the_time_limit_ends_a_search(monkeypatch):
    monkeypatch.setattr("lrq.selection.expression.TIME_LIMIT", 0.2)
    slow = Expression(r"^(?:(?:a|b|ab)+c?)+$", "--exclude-layers x")
    with pytest.raises(InputError, match=r"--exclude-layers x: takes over 0\.2 s on names like ab"):
        any(slow.finds("ab" * 40 + "!") for _ in range(1000))


@pytest.mark.parametrize(
    "text",
    ["((a{1000}){1000}){1000}", "a{99999999999}", f"a{{{'9' * 5000}}}", "a" * 20_000, "(" * 5000, "(?R)", "(a(?1)?b)"],
)
def test_an_expression_that_would_eat_the_memory_is_refused(text):
    with pytest.raises(InputError, match="not a regular expression"):
        Expression(text, "x")


def test_rules_survive_the_way_through_the_provenance(tmp_path, source):
    rules = written(tmp_path, {"fc": {"format": "fp8"}})
    convert(source, tmp_path / "a", "--nvfp4", "--layer-config", rules, "--preset", "none")
    rules.unlink()
    settings = json.loads(load(tmp_path / "a").metadata["lrq"])["settings"]
    assert settings["layer_config"] == {"fc": {"format": "fp8"}} and settings["preset"] == ["none"]
    lrq.quantize(source, tmp_path / "b", **settings)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_call_takes_rules_as_a_file_or_as_a_table(tmp_path, source):
    table = {"fc": {"format": "fp8"}}
    lrq.quantize(source, tmp_path / "a", nvfp4=True, simple=True, layer_config=table)
    lrq.quantize(source, tmp_path / "b", nvfp4=True, simple=True, layer_config=written(tmp_path, table))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for wrong in (5, {"fc": 5}, {"f(": {"skip": True}}):
        with pytest.raises(InputError):
            lrq.quantize(source, tmp_path / "c", layer_config=wrong)
    assert torch.equal(load(source).tensors["tokens"], load(tmp_path / "a").tensors["tokens"])


@pytest.mark.parametrize("spec", [{"format": "int8-row-convrot"}, {"format": "fp8-block"}])
def test_a_rule_whose_format_takes_none_of_the_shapes_is_an_error(tmp_path, spec):
    source = save(tmp_path / "in", {"odd.weight": normal(100, 70), "even.weight": normal(128, 256)})
    (tmp_path / "rules").write_text(json.dumps({"odd": spec}))
    result = run("convert", "-i", source, "-o", tmp_path / "out", "--simple", "--layer-config", tmp_path / "rules")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "finds only weights that can't be quantized so" in line
