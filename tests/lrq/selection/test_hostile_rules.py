"""Layer-configs and plans of any content: obeyed, or refused in one line with nothing written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import run, save, transformer
from lrq.selection.storage import NAMES

FEW = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
sizes = st.sampled_from([16, 0, -1, 3, 1 << 63, 1 << 64, 1e308, True, None, "16"])
specs = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from([*sorted(NAMES), "", "nvfp5", "\0"]) | anything,
        "block_size": sizes,
        "scaling_mode": st.sampled_from(["row", "block", "tensor", "col", 1]),
        "simple": st.booleans() | anything,
        "convrot": st.booleans() | anything,
        "convrot_group_size": sizes,
        "full_precision_matrix_mult": st.booleans() | anything,
        "skip": st.booleans() | anything,
        "unknown": anything,
    },
)
patterns = st.sampled_from(
    ["_default", "blocks", r"blocks\.0", "(", "(a+)+$", r"\p{L}+", "(?R)", "", "a\x1b[2J", "_comment", ".*weight"]
) | st.text(max_size=8)
rules = anything | st.dictionaries(patterns, specs | anything, max_size=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("fuzz") / "in.safetensors", transformer())


@pytest.fixture(scope="module")
def plan(source) -> dict:
    return json.loads(run("plan", source, "--nvfp4", "--simple", "--device", "cpu", "--json").stdout)


def obeyed_or_refused(source: Path, flag: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "file.json").write_bytes(content)
        output = Path(folder, "out.safetensors")
        more = () if flag == "--plan" else ("--simple",)
        result = run("convert", "-i", source, "-o", output, flag, Path(folder, "file.json"), "--device", "cpu", *more)
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert result.exit_code in (0, 2) and output.exists() == (result.exit_code == 0), result.stderr
        assert all(line.isprintable() for line in result.stderr.splitlines()), result.stderr
        if result.exit_code:
            assert len(result.stderr.splitlines()) == 1, result.stderr
            assert not list(Path(folder).glob("*.partial*"))


@FEW
@given(content=rules.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40))
def test_layer_configs(source, content):
    obeyed_or_refused(source, "--layer-config", content)


@FEW
@given(lot=st.data())
def test_plans(source, plan, lot):
    table = json.loads(json.dumps(plan))
    part = lot.draw(st.sampled_from(["layers", "settings", "source", "whole", "nothing"]))
    if part == "whole":
        table = lot.draw(anything)
    elif part != "nothing":
        keys = st.sampled_from(sorted(table[part])) | st.text(max_size=8)
        for key in lot.draw(st.lists(keys, max_size=3)):
            table[part][key] = lot.draw(specs | anything)
    text = json.dumps(table).encode()
    obeyed_or_refused(source, "--plan", text[: lot.draw(st.integers(0, len(text)))] if part == "nothing" else text)
