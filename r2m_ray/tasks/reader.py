"""Rows of untrusted files and datasets: read one by one, in bounded memory, with their place.

A source is a JSON Lines file, plain or gzip, a Parquet file, or the id of a `datasets` dataset, which may
name its split: ``org/name:train_prefs``. Nothing in a source can run code. A row that cannot be read is
a `BadRow`, which the caller refuses or counts; a file that cannot be read is an error.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from r2m_ray.errors import InputError, printable, shown

DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:\S+)?")
MAX_LINE_BYTES = 16 * 2**20
"""A longer line is taken for a damaged file."""
MAX_FILE_BYTES = 4 * 2**30
"""More text than this out of one file is refused, because all of it is kept in memory."""
MAX_RATIO = 200
"""A gzip file that unpacks to more than this many times its size is a bomb, once it is over `FREE_BYTES`."""
FREE_BYTES = 64 * 2**20
BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read, and why."""

    reason: str


PlacedRow = tuple[str, Any]
"""Where a row is, ``file:line``, and its value, which is a `BadRow` where it cannot be read."""


def read_rows(source: str, split: str) -> Iterator[PlacedRow]:
    """Each row of a source; blank lines are no rows.

    Args:
        source: a path, or the id of a `datasets` dataset.
        split: of an id that names none.

    Raises:
        InputError: with file, line and reason, where a source cannot be read or changes meanwhile.
    """
    path, name = Path(source), printable(source)
    if not path.exists():
        yield from _dataset(source, split)
        return
    if path.is_dir():
        raise InputError(f"{name}: a directory; give one of its files")
    if not path.is_file():
        raise InputError(f"{name}: not a regular file; copy its content into one")
    before = _state(path)
    yield from _table(path, name) if path.suffix == ".parquet" else _json_lines(path, name)
    if _state(path) != before:
        raise InputError(f"{name}: changed while it was read; start again when it is complete")


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _json_lines(path: Path, name: str) -> Iterator[PlacedRow]:
    if path.name.endswith(".parquet.gz"):
        raise InputError(f"{name}: a Parquet file is compressed in itself; unpack it")
    place = f"{name}:1"
    try:
        for number, line in enumerate(_lines(path, name), start=1):
            place = f"{name}:{number}"
            row = BadRow(f"longer than {MAX_LINE_BYTES >> 20} MiB") if line is None else _value(line, number)
            if row is not None:
                yield place, row
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{place}: cannot be read after this line ({error}); restore the file") from error


def _lines(path: Path, name: str) -> Iterator[bytes | None]:
    """Each line of a file, unpacked; None for one over the limit, which is read past in pieces."""
    with path.open("rb") as packed:
        unpacked = gzip.GzipFile(fileobj=packed) if path.suffix == ".gz" else None
        stream = cast(IO[bytes], unpacked or packed)
        total, number, is_cut = 0, 1, False
        while piece := stream.readline(MAX_LINE_BYTES + 1):
            total += len(piece)
            _check_total(f"{name}:{number}", total)
            if unpacked and total > FREE_BYTES and total > MAX_RATIO * packed.tell():
                raise InputError(
                    f"{name}:{number}: unpacks to more than {MAX_RATIO} times its size, as a gzip bomb does; "
                    "unpack it yourself if it is none"
                )
            is_long = len(piece) > MAX_LINE_BYTES
            if is_long and not piece.endswith(b"\n"):
                is_cut = True
                continue
            yield None if is_cut or is_long else piece
            number, is_cut = number + 1, False
        if is_cut:
            yield None


def _value(line: bytes, number: int) -> Any:
    """What a line of JSON means, None for a blank one; a `BadRow` for what Python's parser would let pass."""
    try:
        # Editors of some systems mark UTF-8 at the start of a file.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            return None
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        return BadRow("null is not a row") if value is None else value
    except RecursionError:
        return BadRow("nested too deeply; give an object of texts")
    except ValueError as error:
        return BadRow(f"not a line of JSON in UTF-8 ({shown(error)})")


def _without_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        twice = Counter(key for key, _ in items).most_common(1)[0][0]
        raise ValueError(f"key {shown(twice)} is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _table(path: Path, name: str) -> Iterator[PlacedRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as stream, parquet.ParquetFile(stream) as table:
            number = total = 0
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    # Rows of a dictionary column share their bytes in the file, but not here.
                    total += _size(row)
                    _check_total(f"{name}:{number}", total)
                    yield f"{name}:{number}", row
    except (OSError, EOFError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise InputError(f"{name}: not a Parquet file that can be read ({shown(error)})") from error


def _check_total(place: str, total: int) -> None:
    if total > MAX_FILE_BYTES:
        raise InputError(f"{place}: more than {MAX_FILE_BYTES >> 30} GiB so far; split the file")


def _size(value: Any) -> int:
    """Characters and bytes inside a value of a table."""
    if isinstance(value, dict | list):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 8


def _dataset(source: str, split: str) -> Iterator[PlacedRow]:
    name = printable(source)
    if not DATASET_ID.fullmatch(source) or os.path.isabs(source):
        # A bare word could be one of the library's own readers, of whatever files lie here.
        raise InputError(f"{name}: neither a file nor the id of a dataset; give a path, or org/name:split")
    import datasets

    identity, _, named_split = source.partition(":")
    try:
        rows = datasets.load_dataset(identity, split=named_split or split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{name}: neither a file nor a dataset that can be loaded ({shown(error)}); "
            "give a .jsonl or .parquet path, or org/name:split"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row
