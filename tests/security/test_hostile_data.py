"""Broken or hostile data files: refused by line and reason in bounded memory, or skipped and counted."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path

import pytest
from ranks import run_python

from r2m_ray.__main__ import COMMANDS, main
from r2m_ray.cli.commands import Command
from r2m_ray.config.schema import TaskConfig
from r2m_ray.errors import InputError
from r2m_ray.tasks import reader as rows
from r2m_ray.tasks.data import PreferencePair, Preferences, load_preferences
from r2m_ray.tasks.reader import read_rows

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
MIB = 2**20


def load(path: Path, *, skip: int = 0) -> Preferences:
    return load_preferences(str(path), TaskConfig(skip_bad_rows=skip), split="train")


def line(**fields: object) -> bytes:
    return json.dumps(GOOD | fields).encode() + b"\n"


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    return str(caught.value)


# What is no fault


def test_a_byte_order_mark_and_windows_line_ends_are_read_past(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n" + line(prompt="q").replace(b"\n", b"\r\n"))
    assert [pair.prompt for pair in load(file).pairs] == ["p", "q"]


@pytest.mark.parametrize(
    "text",
    [
        "שלום\u200f world\u200e!",
        "\u202bعربي\u202c and \u2067עברית\u2069",
        "tab\tline\nwindows\r\n",
        "狐🦊",
        "zero\u200dwidth",
    ],
)
def test_text_of_any_language_is_kept_as_it_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(line(prompt=text))
    assert load(file).pairs == (PreferencePair(prompt=text, chosen="c", rejected="r"),)


# What is


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (line(prompt="\x1b[2J"), "field 'prompt' has the character \\x1b"),
        (line(chosen="a\x7f"), "field 'chosen' has the character \\x7f"),
        (line(chosen="a\x9b31m"), "field 'chosen' has the character \\x9b"),
        (line(rejected="exe.\u202egpj"), "field 'rejected' has the character \\u202e"),
        (line(prompt=""), "field 'prompt' must be a text that is not empty"),
        (line(prompt=[]), "field 'prompt' must be a text that is not empty, not a list"),
        (line(prompt=None), "field 'prompt' must be a text that is not empty, not null"),
        (b"null\n", "null is not a row"),
        (b"[1]\n", "a JSON object with prompt, chosen, rejected is needed, not a list"),
        (b'{"prompt": -Infinity}\n', "-Infinity is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "not a line of JSON"),
        (b"\xff\xfe{\x00}\x00\n", "not a line of JSON in UTF-8"),
        (b"\x80\x04\x95\x00.\n", "not a line of JSON in UTF-8"),
        (b'{"a":' * 50_000 + b"\n", "nested too deeply"),
        (b'{"x\\u001b[2J": 1}\n', "no field 'prompt' among x\\x1b[2J"),
        (b"x" * (16 * MIB + 1) + b"\n", "longer than 16 MiB"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_or_skipped_and_counted(
    second: bytes, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(line() + second + line(prompt="q"))
    text = refusal(file)
    assert text.startswith(f"{file}:2: ")
    assert reason in text
    assert "task.skip_bad_rows" in text
    found = load(file, skip=1)
    assert [pair.prompt for pair in found.pairs] == ["p", "q"]
    assert found.places == (f"{file}:1", f"{file}:3")
    assert found.counts() == {"rows": 3, "used": 2, "bad rows": 1}


def test_skipping_is_capped(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(line() + b"{\n" * 3)
    assert load(file, skip=3).counts() == {"rows": 4, "used": 1, "bad rows": 3}
    with pytest.raises(InputError, match=r"a\.jsonl:4: .*2 bad rows before it were skipped, as many as"):
        load(file, skip=2)


def test_what_a_file_says_is_escaped_and_cut_where_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"error: \\u001b[31mfaked\\nline' + b"k" * 100_000 + b'": 1}\n')
    monkeypatch.setitem(COMMANDS, "load", Command("", "", lambda _: len(load(file).pairs)))
    assert main(["load"]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert "\\x1b[31mfaked\\x0aline" in printed
    assert len(printed) < 600


def test_a_source_that_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    assert refusal(pipe) == f"{pipe}: not a regular file; copy its content into one"
    assert "a directory; give one of its files" in refusal(tmp_path)
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(gzip.compress(b"PAR1"))
    assert "unpack it" in refusal(packed)
    # A bare word is the name of a reader in `datasets`; one of them unpickles what it finds here.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(b"\x80\x04.")
    assert "neither a file nor the id of a dataset" in refusal(Path("pandas"))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_changes_while_it_is_read_is_refused(replaced: bool, tmp_path: Path) -> None:
    """It grows, or an equal one takes its place."""
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (file, other):
        path.write_bytes(line() * 3)
    reading = read_rows(str(file), "train")
    next(reading)
    if replaced:
        other.replace(file)
    else:
        file.write_bytes(line() * 4)
    with pytest.raises(InputError, match=r"a\.jsonl: changed while it was read"):
        list(reading)


def bomb(path: Path, mib: int) -> Path:
    """A gzip file of ``mib`` MiB of spaces, in a thousandth of that."""
    packer = zlib.compressobj(9, wbits=31)
    with path.open("wb") as stream:
        for _ in range(mib):
            stream.write(packer.compress(b" " * (MIB - 1) + b"\n"))
        stream.write(packer.flush())
    return path


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    file = bomb(tmp_path / "bomb.jsonl.gz", 80)
    text = refusal(file)
    assert text.startswith(f"{file}:65: unpacks to more than 200 times its size")


def test_ordinary_compression_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FREE_BYTES", 0)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(line(prompt=f"{i} {i * i}") for i in range(1000))))
    assert len(load(file).pairs) == 1000


def test_all_of_a_source_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(rows, "MAX_FILE_BYTES", 30 * MIB)
    table = tmp_path / "a.parquet"
    # A dictionary stores the long text once; each row unpacks three of it.
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 128, pyarrow.int32()), pyarrow.array(["x" * MIB])
    )
    parquet.write_table(pyarrow.table(dict.fromkeys(GOOD, column)), table)
    assert table.stat().st_size < 4 * MIB
    assert f"{table}:11: more than" in refusal(table)

    lines = tmp_path / "a.jsonl"
    lines.write_bytes(line(prompt="x" * MIB) * 31)
    assert f"{lines}:30: more than" in refusal(lines)


MEASURE = """
import resource, sys, tracemalloc
from r2m_ray.tasks.reader import BadRow, read_rows

tracemalloc.start()
found = [row for _, row in read_rows(sys.argv[1], "train")]
print(found == [BadRow("longer than 16 MiB"), {"a": 1}], tracemalloc.get_traced_memory()[1] >> 20)
"""


def test_a_line_of_a_gibibyte_costs_no_gibibyte(tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    with file.open("wb") as sparse:
        sparse.truncate(2**30)
        sparse.seek(0, os.SEEK_END)
        sparse.write(b'\n{"a": 1}\n')
    is_right, peak_mib = run_python("-c", MEASURE, file)[0].split()
    assert is_right == "True"
    # A piece of 16 MiB, the reader's copy of it, and the one before.
    assert int(peak_mib) < 64
