"""Files of rows, whatever they are packed in: JSON lines, a JSON array, CSV, Parquet, any of the first three in gzip.

What a file is, its first bytes say; only CSV has none and is known by its name. Each reader yields where a row stands
and the row as a dict, or what is wrong there as text.
"""

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.acquire import pointers
from tasks.frame import jsonl

Found = Iterator[tuple[str, dict[str, Any] | str]]

ENDINGS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
MAX_FILE = 2**29  # bytes, unpacked: all rows are held in memory, several times over
MAX_ROW = 2**22  # bytes of a line, characters of a conversation: more than the window of any model that is trained here
# Beginnings of what people bring by mistake, and what it is.
OTHERS: Mapping[bytes, str] = {
    b"PK\x03\x04": "a ZIP archive or a spreadsheet: unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it with `zstd -d`",
    b"BZh": "compressed by bzip2: unpack it with `bunzip2`",
    b"\xfd7zXZ": "compressed by xz: unpack it with `unxz`",
    b"ARROW1": "an Arrow file: save it as Parquet or JSONL",
    b"\xff\xff\xff\xff": "an Arrow stream: save it as Parquet or JSONL",
    b"SQLite format 3": "an SQLite database: save the table as CSV or JSONL",
    b"\x80": "a pickle, which is never opened: save it as JSONL",
    b"%PDF": "a PDF: write its rows as JSONL",
    b"<": "a page of HTML or XML (a download that was refused?): fetch the data itself",
}


def read(path: Path, shown: str) -> Found:
    """The rows of a file, which messages call `shown`."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = file.seek(0, io.SEEK_END)
        if head.startswith(b"PAR1"):
            yield from _parquet(path, shown)
            return
        if size > MAX_FILE:
            yield shown, f"{size / 1e9:.1f} GB, at most {MAX_FILE / 1e9:.1f} GB are read: take a part of it"
            return
        content = _unpacked(path) if head.startswith(b"\x1f\x8b") else path.read_bytes()
    except OSError as error:
        yield shown, f"{error.strerror or error}: name a readable file of rows"
        return
    except (EOFError, zlib.error) as error:
        yield shown, f"a gzip file that is cut off or damaged ({error}): fetch it again"
        return
    if content is None:
        yield shown, f"more than {MAX_FILE / 1e9:.1f} GB when unpacked: take a part of it"
    elif pointers.is_pointer(content):
        yield shown, pointers.ADVICE
    elif what := _foreign(content):
        yield shown, what
    else:
        yield from _text(content, path.name.lower().removesuffix(".gz"), shown)


def _unpacked(path: Path) -> bytes | None:
    with gzip.open(path) as file:
        content = file.read(MAX_FILE + 1)
    return content if len(content) <= MAX_FILE else None


def _foreign(content: bytes) -> str | None:
    return next((what for head, what in OTHERS.items() if content.startswith(head)), None)


def _text(content: bytes, name: str, shown: str) -> Found:
    encoding = json.detect_encoding(content[:4])
    if not encoding.startswith("utf-8"):  # UTF-16 and UTF-32, by their mark or their zeros
        try:
            content = content.decode(encoding).encode()
        except UnicodeError as error:
            yield shown, f"{encoding} that cannot be read ({error}): save it as UTF-8"
            return
    if name.endswith((".csv", ".tsv")):
        yield from _csv(content, shown)
    elif content.removeprefix(jsonl.BOM).lstrip()[:1] == b"[":
        yield from _array(content, shown)
    else:
        yield from _lines(content, shown)


def _lines(content: bytes, shown: str) -> Found:
    if _spread(content):
        yield shown, "one JSON object over several lines: JSONL wants a row on each line, `jq -c .` writes it so"
        return
    for number, line in jsonl.lines(content):
        if len(line) > MAX_ROW:
            yield f"{shown}:{number}", f"a row of {len(line) / 1e6:.1f} MB, at most {MAX_ROW / 1e6:.1f} MB are taken"
        else:
            yield f"{shown}:{number}", _object(_parsed(line))


def _spread(content: bytes) -> bool:
    """Does an object begin on the first line that ends on a later one?"""
    head = content[:MAX_ROW]
    first = next((line for _, line in jsonl.lines(head)), b"").strip()
    if not first.startswith(b"{") or isinstance(_parsed(first), dict):
        return False
    try:
        json.JSONDecoder().raw_decode(head.removeprefix(jsonl.BOM).decode(errors="ignore").lstrip())
    except (ValueError, RecursionError):
        return first == b"{"
    return True


def _array(content: bytes, shown: str) -> Found:
    values = _parsed(content.removeprefix(jsonl.BOM))
    if isinstance(values, str):
        # Lines of arrays are no array of rows; each is told by its line then.
        first = next(line for _, line in jsonl.lines(content))
        if isinstance(_parsed(first), list):
            yield from ((f"{shown}:{number}", _object(_parsed(line))) for number, line in jsonl.lines(content))
        else:
            yield shown, f"a JSON array that is damaged: {values}"
        return
    for number, value in enumerate(values, 1):
        yield f"{shown}: row {number}", _object(value)


def _parsed(text: bytes) -> Any:
    """The value of a JSON text, or a string that says what is wrong; a JSON string counts as wrong too."""
    try:
        value = json.loads(text.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        return f"not JSON: {error.msg} ({place})"
    except (ValueError, RecursionError):
        return "not JSON that can be read: a number too long or brackets too deep"
    return "a str, not an object with messages" if isinstance(value, str) else value


def _object(value: Any) -> dict[str, Any] | str:
    if isinstance(value, dict | str):
        return value
    return f"a {type(value).__name__}, not an object with messages"


def _csv(content: bytes, shown: str) -> Found:
    try:
        text = content.removeprefix(jsonl.BOM).decode()
    except UnicodeDecodeError as error:
        yield shown, f"not UTF-8 (byte {error.start}): save it as `CSV UTF-8`"
        return
    header = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    names: list[str] = []
    line = 1
    try:
        for row in rows:
            where, line = f"{shown}:{line}", rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if not names:
                names = [name.strip() for name in row]
                if len(set(names)) < len(names):
                    yield where, "two columns of one name: name each column once"
                    return
            elif len(row) != len(names):
                yield where, f"{len(row)} fields, the header names {len(names)} columns"
            else:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        yield f"{shown}:{rows.line_num}", f"not CSV: {error}"


def _parquet(path: Path, shown: str) -> Found:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        yield shown, "a Parquet file, and pyarrow is not installed to read it: run `pip install pyarrow`"
        return
    number = size = 0
    try:
        with parquet.ParquetFile(path) as file:
            labels = _labels(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(batch_size=256):
                size += batch.nbytes
                if size > MAX_FILE:
                    yield shown, f"more than {MAX_FILE / 1e9:.1f} GB when unpacked: take a part of it"
                    return
                for row in batch.to_pylist():
                    number += 1
                    for name, names in labels.items():
                        if isinstance(at := row.get(name), int) and 0 <= at < len(names):
                            row[name] = names[at]
                    yield f"{shown}: row {number}", row
    except (arrow.ArrowException, OSError, ValueError) as error:
        yield shown, f"a Parquet file that cannot be read ({str(error)[:200]}): write it again"


def _labels(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of classes that the `datasets` library keeps as numbers, by column."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def missing(value: Any) -> bool:
    """Null, and what pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))
