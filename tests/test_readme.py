"""The README's figures are those of the kept results."""

from __future__ import annotations

import json
from pathlib import Path

import readme_tables


def test_the_tables_are_those_of_the_results() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert readme_tables.with_tables(readme) == readme


def test_every_kept_kernel_gave_the_bits_of_the_reference() -> None:
    for path in readme_tables.RESULTS.glob("kernels-*.json"):
        compared = [row.get("same_bits_as_reference") for row in json.loads(path.read_text())["results"]]
        assert True in compared and False not in compared, path.name
