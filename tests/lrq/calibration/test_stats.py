"""The file of statistics: streamed, merged, read back, and refused in one line where it is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrq
from checkpoints import normal, run, save
from lrq.calibration.inputs import BINS, bin_edge, magnitude_bins, merge
from lrq.calibration.stats import Accumulator, load_stats, merge_stats, save_stats
from lrq.errors import InputError
from measured import inputs, save_for, statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streamed_is_exact(dtype: torch.dtype) -> None:
    x = inputs(1000, 48).to(dtype)
    accumulator = Accumulator(48)
    for part in x.split(77):
        accumulator.update(part.view(1, -1, 48))
    stats, exact = accumulator.result(), x.double()
    assert stats is not None and stats.count == 1000
    torch.testing.assert_close(stats.mean, exact.mean(0), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(stats.second, exact.square().mean(0), rtol=1e-13, atol=0)
    assert stats.gram is not None
    torch.testing.assert_close(stats.gram.double(), exact.T @ exact / 1000, rtol=1e-5, atol=1e-5)
    assert stats.amax == x.abs().amax().item() and int(stats.histogram.sum()) == x.numel()
    again = accumulator.result()
    assert again is not None and torch.equal(again.histogram, stats.histogram), "a result changes nothing"


def test_wide_layers_keep_the_leading_eigenpairs() -> None:
    """Of inputs of rank 12 the sketch keeps everything; of a flat spectrum nearly all that it can."""
    low = normal(500, 12) @ normal(12, 200, seed=1)
    stats = statistics(low, gram_limit=100, rank=16)
    exact = low.double().T @ low.double() / 500
    assert stats.gram is None and stats.vectors is not None and stats.values is not None
    rebuilt = stats.vectors.double() * stats.values.double() @ stats.vectors.double().T
    assert (rebuilt - exact).norm() < 1e-4 * exact.norm()
    full = inputs(800, 300)
    stats = statistics(full, gram_limit=100, rank=64)
    assert stats.values is not None
    best = torch.linalg.eigvalsh(full.double().T @ full.double() / 800).flip(0)[:64]
    assert 0.9 * best.sum() < stats.values.sum() <= best.sum() * (1 + 1e-6)
    assert statistics(full, gram_limit=100, rank=0).vectors is None


@pytest.mark.parametrize("options", [{}, {"gram_limit": 1, "rank": 40}, {"gram_limit": 1, "rank": 0}])
def test_merged_runs_are_one_run(options: dict[str, int]) -> None:
    x = torch.cat((inputs(300, 40), 5 + inputs(700, 40, seed=9)))
    whole, merged = statistics(x, **options), merge(statistics(x[:300], **options), statistics(x[300:], **options))
    assert merged.count == whole.count and merged.amax == whole.amax
    assert torch.equal(merged.histogram, whole.histogram)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged.second, whole.second, rtol=1e-13, atol=0)
    for name in ("gram", "values"):
        a, b = getattr(merged, name), getattr(whole, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_runs_of_unequal_kinds_merge_to_the_poorer() -> None:
    x = inputs(400, 40)
    whole, leading, diagonal = statistics(x), statistics(x, gram_limit=1, rank=8), statistics(x, gram_limit=1, rank=0)
    both = merge_stats({"a": whole, "b": whole}, {"a": leading}, {"c": whole})
    assert both["a"].gram is None and both["a"].values is not None and both["a"].values.numel() == 8
    torch.testing.assert_close(both["a"].values, leading.values, rtol=2e-2, atol=1e-3)
    assert both["b"] is whole and merge(diagonal, whole).vectors is None
    with pytest.raises(lrq.InputError, match="layer a: the inputs have 40 columns here and 8 there"):
        merge_stats({"a": whole}, {"a": statistics(normal(9, 8))})


def test_the_histogram_gives_percentiles_to_a_bin() -> None:
    x = normal(20000, 4)
    stats = statistics(x)
    for percent in (50.0, 90.0, 99.0, 99.9):
        exact = x.abs().flatten().quantile(percent / 100).item()
        assert exact <= stats.percentile(percent) <= 1.125 * exact * 1.01
    assert stats.percentile(100.0) == stats.amax
    edges = torch.tensor([bin_edge(i) for i in range(BINS - 1)])
    counted = magnitude_bins(edges)
    # An edge belongs to the bin above it.
    assert not counted[0] and bool((counted[1:] == 1).all())
    assert (
        int(magnitude_bins(torch.tensor([0.0, -1e-30]))[0]) == 2 and int(magnitude_bins(torch.tensor([1e30]))[-1]) == 1
    )


def test_read_back_as_saved(tmp_path: Path) -> None:
    saved = {"a.b": statistics(inputs(90, 24)), "c": statistics(inputs(90, 24), gram_limit=1, rank=4)}
    save_stats(tmp_path / "s.safetensors", saved, "measured", model="x")
    found = load_stats(tmp_path / "s.safetensors")
    assert set(found) == set(saved) and found.measured and found.metadata["model"] == "x"
    for name, one in saved.items():
        for key in one.__dataclass_fields__:
            a, b = getattr(found[name], key), getattr(one, key)
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, key
    assert found.brief("a.b").gram is None and found.columns("c") == 24
    with pytest.raises(KeyError):
        found["missing"]


WRONG = {
    "no metadata": (lambda t, m: m.clear(), "holds no input statistics"),
    "another layout": (lambda t, m: m.update(lrq_stats="2"), "statistics of layout 2"),
    "origin": (lambda t, m: m.update(origin="dreamt"), "origin must be measured or simulated"),
    "a foreign tensor": (lambda t, m: t.update(other=torch.ones(1)), "other is no statistic"),
    "no count": (lambda t, m: t.pop("fc.count"), "count is missing"),
    "no mean": (lambda t, m: t.pop("fc.mean"), "mean is missing"),
    "dtype": (lambda t, m: t.update({"fc.mean": t["fc.mean"].float()}), "must be F64, is F32"),
    "shape": (lambda t, m: t.update({"fc.second": t["fc.second"][:3]}), "second must be"),
    "histogram": (lambda t, m: t.update({"fc.histogram": t["fc.histogram"][:3]}), "histogram must be"),
    "half a pair": (lambda t, m: t.update({"fc.eigenvalues": torch.ones(2)}), "but not both"),
    "another K": (
        lambda t, m: t.update({"fc.mean": torch.zeros(5).double(), "fc.second": torch.ones(5).double()}),
        "gram",
    ),
    "NaN": (lambda t, m: t["fc.mean"].fill_(float("nan")), "mean is NaN"),
    "negative": (lambda t, m: t["fc.second"].fill_(-1), "second is negative"),
    "amax": (lambda t, m: t["fc.amax"].fill_(1e-3), "larger than amax squared"),
    "no tokens": (lambda t, m: t["fc.count"].fill_(0), "count is 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_malformed_file_is_one_line(tmp_path: Path, what: str) -> None:
    source = save(tmp_path / "in.safetensors", {"fc.weight": normal(32, 32), "fc.bias": normal(32)})
    path = save_for(tmp_path / "s.safetensors", {"fc": inputs(50, 32)})
    tensors, metadata = load_file(path), {"lrq_stats": "1", "origin": "measured"}
    change, word = WRONG[what]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    result = run("convert", "-i", source, "-o", tmp_path / "out.safetensors", "--simple", "--calib", path)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and word in line, line
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("content,word", [(None, "can't be read"), (b"junk" * 9, "no safetensors file")])
def test_no_file_is_one_line(tmp_path: Path, content: bytes | None, word: str) -> None:
    source, path = save(tmp_path / "in.safetensors", {"fc.weight": normal(32, 32)}), tmp_path / "s.safetensors"
    if content is not None:
        path.write_bytes(content)
    result = run("convert", "-i", source, "--calib", path)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and word in line


@pytest.mark.parametrize(
    "layers,word", [({"other": 32}, "but no layer that is quantized"), ({"fc": 16}, "has 16 inputs")]
)
def test_statistics_of_another_model_are_refused(tmp_path: Path, layers: dict[str, int], word: str) -> None:
    source = save(tmp_path / "in.safetensors", {"fc.weight": normal(32, 32)})
    path = save_for(tmp_path / "s.safetensors", {name: inputs(50, columns) for name, columns in layers.items()})
    for command in (("convert", "-i", source), ("plan", source)):
        result = run(*command, "--calib", path)
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and word in line and "another model" in line


def test_merged_files_keep_what_they_say_of_all_layers(tmp_path: Path) -> None:
    stats = {name: statistics(inputs(40, 8)) for name in ("a", "b")}
    for name, origin, about in (("one", "measured", {"transposed": "b"}), ("guess", "simulated", {})):
        save_stats(tmp_path / name, stats, origin, **about)
    one, guess = (load_stats(tmp_path / name) for name in ("one", "guess"))
    save_stats(tmp_path / "both", merge_stats(one, merge_stats(one, one)), "measured")
    both = load_stats(tmp_path / "both")
    assert both.transposed == ("b",) and set(both) == {"a", "b"} and both["a"].count == 3 * one["a"].count
    with pytest.raises(InputError, match="can't be merged"):
        merge_stats(one, guess)
    for simulated in (guess, merge_stats(guess, guess)):
        with pytest.raises(InputError, match="are simulated"):
            save_stats(tmp_path / "both", simulated, "measured")


def test_a_conversion_that_is_under_way_keeps_its_files(tmp_path: Path) -> None:
    partial = tmp_path / "stats.safetensors.partial"
    partial.write_bytes(b"a conversion's")
    save_for(tmp_path / "stats.safetensors", {"a": inputs(40, 8)})
    assert partial.read_bytes() == b"a conversion's" and len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    save_for(tmp_path / "stats", {"a": inputs(40, 8)})
    stats = load_stats(tmp_path / "stats")
    save_for(tmp_path / "stats", {"a": inputs(41, 8)})
    with pytest.raises(InputError, match="changed while it was in use"):
        stats["a"]


def test_a_model_whose_layers_are_all_transposed_is_told_so(tmp_path: Path) -> None:
    source = save(tmp_path / "in", {"a.weight": normal(64, 64)})
    save_stats(tmp_path / "stats", {"a": statistics(inputs(40, 64))}, "measured", transposed="a")
    result = run("convert", "-i", source, "-o", tmp_path / "o", "--simple", "--calib", tmp_path / "stats")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "all layers are stored as [K,N]" in line


def test_metadata_takes_any_name(tmp_path: Path) -> None:
    save_stats(tmp_path / "stats", {"a": statistics(inputs(40, 8))}, "simulated", model="m\udcff")
    assert load_stats(tmp_path / "stats").metadata["model"] == "m\\udcff"


@pytest.mark.parametrize("optimizer", ["discrete", "gptq"])
def test_a_negative_second_moment_is_of_no_inputs(tmp_path: Path, optimizer: str) -> None:
    source = save(tmp_path / "in", {"a.weight": normal(64, 64)})
    stats = dataclasses.replace(statistics(inputs(400, 64)), gram=-torch.eye(64))
    save_stats(tmp_path / "stats", {"a": stats}, "measured")
    flags = ("--nvfp4", "--calib", tmp_path / "stats", "--optimizer", optimizer)
    result = run("convert", "-i", source, "-o", tmp_path / "o", *flags)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "negative eigenvalue" in line


def test_sums_that_lose_digits_contradict_nothing(tmp_path: Path) -> None:
    """As float32 does on a GPU, to an input that is always the same."""
    accumulator = Accumulator(2)
    accumulator.update(torch.tensor([[3.0, 0.5]]).expand(100, 2))
    accumulator._totals["second"] *= 1 - 1e-5
    stats = accumulator.result()
    assert stats is not None and (stats.second >= stats.mean.square()).all()
    save_stats(tmp_path / "stats.safetensors", {"a": stats}, "measured")
    assert load_stats(tmp_path / "stats.safetensors")["a"].count == 100
