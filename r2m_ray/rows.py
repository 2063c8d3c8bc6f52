"""Rows of files and datasets that nobody here wrote: read one by one, in bounded memory, with their place.

A source is a JSON Lines or Parquet file, plain or gzip, or the id of a `datasets` dataset, which may name
its split: ``org/name:train_prefs``. Nothing in a source can run code.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r2m_ray.errors import InputError

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is taken for a damaged file."""
MAX_FILE_BYTES = 16 * 2**30
"""More than this out of one file is taken for a gzip bomb."""

PlacedRow = tuple[str, Any]
"""A row, and where it is: ``file:line``."""


def read_rows(source: str, split: str) -> Iterator[PlacedRow]:
    """Each row of a source; blank lines are none. split: of a `datasets` id that names none.

    Raises InputError with file, line and reason for a source, or a line of it, that cannot be read.
    """
    path = Path(source)
    if not path.exists():
        yield from _dataset(source, split)
    elif path.is_dir():
        raise InputError(f"{path}: a directory; give one of its files")
    elif path.name.removesuffix(".gz").endswith(".parquet"):
        yield from _table(path)
    else:
        yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[PlacedRow]:
    place = f"{path}:1"
    total = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
                place = f"{path}:{number}"
                total += len(line)
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        f"{place}: longer than {MAX_LINE_BYTES >> 20} MiB; give one row per line"
                    )
                if total > MAX_FILE_BYTES:
                    raise InputError(f"{place}: more than {MAX_FILE_BYTES >> 30} GiB so far; split the file")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield place, _object(text)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{place}: cannot be read after this line ({error}); restore the file") from error
    except RecursionError as error:
        raise InputError(f"{place}: nested too deeply; give an object of texts") from error
    except ValueError as error:
        raise InputError(f"{place}: not a line of JSON in UTF-8 ({error})") from error


def _object(text: str) -> Any:
    """A JSON value; ValueError for what Python's parser would let pass: NaN, and a key given twice."""
    return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)


def _without_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _table(path: Path) -> Iterator[PlacedRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        with (
            gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream,
            parquet.ParquetFile(stream) as table,
        ):
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({error})") from error


def _dataset(source: str, split: str) -> Iterator[PlacedRow]:
    import datasets

    name, _, named_split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=named_split or split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{source}: neither a file nor a dataset that can be loaded ({error}); "
            "give a .jsonl or .parquet path, or org/name:split"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}:{number}", row
