"""Tables of measured rows as CSV files, in which a row that is measured again takes its old one's place."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pwm_gym.serialization import atomic_write


def put_row(path: pathlib.Path, row: Mapping[str, Any], key: Sequence[str]) -> None:
    """Add a row to a table, or replace the one that is equal in the columns of `key`."""
    rows: list[Mapping[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8") as file:
            rows = [old for old in csv.DictReader(file) if any(old.get(name) != str(row[name]) for name in key)]
    write_rows(path, [*rows, row])


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table whose columns are those of its last row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[-1].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
