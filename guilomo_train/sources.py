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
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from datasets import load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from pyarrow import parquet

from guilomo_train.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
RawRows = list[tuple[str, Any]]  # where a row stands, and the row

# What `datasets` raises for a name that it cannot load.
_NOT_LOADED = (DatasetsError, FileNotFoundError, ValueError, ConnectionError)


def read(source: str) -> RawRows:
    """Reads all rows of a source.

    Args:
        source: a file; or NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of a folder or of a data set that
            the `datasets` library can load. The split is "train" if it isn't given.

    Raises:
        DataError: the source, or a row of it, cannot be read.
    """
    path = Path(source)
    if path.is_file() or _kind(path) is not None:
        return list(_read_file(path))
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    if Path(name).is_dir():
        return [row for file in _files(Path(name), config, split) for row in _read_file(file)]
    try:
        dataset = load_dataset(name, config, split=split)
    except _NOT_LOADED as e:
        raise DataError(f"{source}: not a file, and not a data set to load: {_why(e)}") from None
    return [(f"{source}, row {i}", row) for i, row in enumerate(dataset)]


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
        try:
            rows = parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as e:
            raise DataError(f"{path}: cannot be read as Parquet ({_why(e)})") from None
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
        return
    text = _text(path)
    if kind in (".csv", ".tsv"):
        yield from _of_table(path, text, "\t" if kind == ".tsv" else ",")
    elif kind == ".json" and text.lstrip().startswith("["):
        rows = _parsed(text, str(path))
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
    else:
        # Not splitlines: JSON strings may have line separators of Unicode in them.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parsed(line, where)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read as text ({e})") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON ({e})") from None


def _of_table(path: Path, text: str, separator: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                raise DataError(f"{where}: has not the {expected} columns of the first line")
            yield where, row
    except csv.Error as e:
        raise DataError(f"{path}, line {reader.line_num}: not a table ({e})") from None
