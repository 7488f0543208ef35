"""Raw rows of a data set: of a file, of a folder of files, or of a name that `datasets` can load.

    rows.jsonl      an object a line
    rows.json       an array of objects, or as .jsonl
    rows.csv .tsv   columns by the names in the first line
    rows.parquet

All but Parquet may be compressed (rows.jsonl.gz). A folder's files belong to splits by their names
(train.jsonl, test-00000.parquet), by the rules of `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow
from datasets import load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from pyarrow import parquet

from guilomo_train.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# What `datasets` raises for a name that it cannot load.
_NOT_LOADED = (DatasetsError, FileNotFoundError, ValueError, ConnectionError)


def read(source: str) -> Iterator[tuple[str, Any]]:
    """Reads the rows of a source one after another, so that it may be larger than memory (but for
    a JSON array, which is read whole).

    Args:
        source: a file; or NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of a folder or of a data set that
            the `datasets` library can load. The split is "train" if it isn't given.

    Yields:
        Where a row stands, and the row.

    Raises:
        DataError: the source, or a row of it, cannot be read.
    """
    path = Path(source)
    if path.is_file() or _kind(path) is not None:
        yield from _read_file(path)
        return
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    if Path(name).is_dir():
        for file in _files(Path(name), config, split):
            yield from _read_file(file)
        return
    try:
        dataset = load_dataset(name, config, split=split)
    except _NOT_LOADED as e:
        raise DataError(f"{source}: not a file, and not a data set to load: {_why(e)}") from None
    yield from ((f"{source}, row {i}", _own(row)) for i, row in enumerate(dataset))


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read; None where it says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _files(folder: Path, config: str | None, split: str) -> list[Path]:
    try:
        by_split = load_dataset_builder(str(folder), config).config.data_files or {}
    except _NOT_LOADED as e:
        raise DataError(f"{folder}: no data set: {_why(e)}") from None
    if split not in by_split:
        raise DataError(f"{folder}: has no split {split!r}, only {sorted(map(str, by_split))}")
    return [Path(file) for file in by_split[split]]


def _why(error: Exception) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    kind = _kind(path)
    if kind == ".parquet":
        yield from _of_parquet(path)
        return
    try:
        with _open(path) as text:
            if kind in (".csv", ".tsv"):
                yield from _of_table(path, text, "\t" if kind == ".tsv" else ",")
            elif kind == ".json" and _is_array(text):
                rows = _parsed(text.read(), str(path))
                yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
            else:
                for number, line in enumerate(text, start=1):
                    if line.strip():
                        where = f"{path}, line {number}"
                        yield where, _parsed(line, where)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read as text ({e})") from None


def _open(path: Path) -> TextIO:
    # Lines end in \n alone: JSON strings may have line separators of Unicode in them.
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def _is_array(text: TextIO) -> bool:
    """Whether a text begins with `[`; it is left at its beginning."""
    first = next((line.lstrip() for line in text if line.strip()), "")
    text.seek(0)
    return first.startswith("[")


def _of_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", _own(row)
                    number += 1
    except (OSError, pyarrow.ArrowException) as e:
        raise DataError(f"{path}: cannot be read as Parquet ({_why(e)})") from None


def _own(value: Any) -> Any:
    """A value of Arrow without nulls in its objects: a key that one object has all others get."""
    if isinstance(value, dict):
        return {key: _own(inner) for key, inner in value.items() if inner is not None}
    return [_own(inner) for inner in value] if isinstance(value, list) else value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON ({e})") from None


def _of_table(path: Path, text: TextIO, separator: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(text, delimiter=separator, strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                raise DataError(f"{where}: has not the {expected} columns of the first line")
            yield where, row
    except csv.Error as e:
        raise DataError(f"{path}, line {reader.line_num}: not a table ({e})") from None
