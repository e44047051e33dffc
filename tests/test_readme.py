"""The figures of the README and of docs/FORMATS.md are those of the kept results."""

from __future__ import annotations

import json
from pathlib import Path

import readme_tables


def test_the_tables_are_those_of_the_results() -> None:
    for name, tables in readme_tables.DOCUMENTS.items():
        text = (Path(__file__).parents[1] / name).read_text()
        assert readme_tables.with_tables(text, tables) == text, name


def test_every_kept_kernel_gave_the_bits_of_the_reference() -> None:
    for path in readme_tables.RESULTS.glob("kernels-*.json"):
        compared = [row.get("same_bits_as_reference") for row in json.loads(path.read_text())["results"]]
        assert True in compared and False not in compared, path.name
