"""From a named source of text to shards and a tokenizer on disk.

Text is split by the hash of each document (equal documents share a side, so none can be in both),
the tokenizer is trained on the training side only, and both sides are written as shards into a
cache folder named by everything that determines them. Published or user-given shards are used as
they are; the challenge's own are fetched from the Hugging Face hub (progress bars, resumption and a
local cache come with its library).
"""

from __future__ import annotations

import errno
import filecmp
import glob
import hashlib
import json
import logging
import lzma
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np

from qat.errors import NO_LOCKS, UserError
from qat.settings import machine
from qat.text import corpus
from qat.text.shards import ShardWriter, TokenStream
from qat.text.tokenizer import Tokenizer, train_tokenizer

if TYPE_CHECKING:
    from qat.settings.schema import DataSettings

log = logging.getLogger("qat")

LAYOUT = 4  # of the cache; raise it when the preparation below changes what it writes
BATCH_BYTES = 1_000_000  # of text, and a document more, that are encoded at a time
TOKENIZER_BYTES = 64_000_000  # of text, and a document more, train the tokenizer
YARDSTICK_BYTES = 8_000_000
SPLIT_HASH_BYTES = 8
PASSAGES, PASSAGE_TOKENS = 4, 256  # of validation text, that are looked for in training text
NOTES_FILE = "notes.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # nothing that is read says so
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
CACHE_KEY = re.compile("[0-9a-f]{16}")
SIDECAR = re.compile(r"(.+)_bytes(_\d+)?")  # the challenge's: how many bytes each token stands for


@dataclass(frozen=True)
class Source:
    """Shards of both splits and their tokenizer. ``identity`` goes into artifacts' headers,
    ``files`` (path -> hash of content) are those that the text was read from."""

    train_files: list[Path]
    val_files: list[Path]
    tokenizer: Path
    identity: dict[str, Any]
    notes: dict[str, Any]  # facts found while preparing: documents, bytes, xz yardstick
    files: dict[str, str] = field(default_factory=dict, compare=False)

    def setting(self, side: str) -> str:
        """What the user gave the text of ``train`` or ``val`` by."""
        name = self.identity["name"]
        return f"data.{side}_files" if name == "shards" else _typed(name)


def _typed(name: str) -> str:
    """What a source that is no shards was given by."""
    return "data.files" if name == "text" else f"data={name}"


def check_length(source: Source, train: TokenStream, batch_tokens: int) -> None:
    """UserError if a step would see training tokens twice."""
    if len(train) <= batch_tokens:
        raise UserError(
            f"{source.setting('train')}: {len(train):,} training tokens, fewer than the "
            f"batch_tokens + 1 = {batch_tokens + 1:,} of one step; give more text, or a smaller "
            "batch_tokens"
        )


def check_apart(source: Source, train: TokenStream, val: TokenStream) -> None:
    """UserError if most of a few passages of the validation text are training text too (reads every
    token). Of shards that the user gave, however they are cut; other text was split here."""
    if source.identity["name"] != "shards" or len(val) < PASSAGES * PASSAGE_TOKENS:
        return
    starts = [number * len(val) // PASSAGES for number in range(PASSAGES)]
    found = train.count_held([val.take(start, PASSAGE_TOKENS) for start in starts])
    if found > PASSAGES / 2:
        raise UserError(
            f"data.val_files: {found} of {PASSAGES} passages of it, of {PASSAGE_TOKENS} "
            "tokens, are in data.train_files too; give other text "
            "(`python eval.py task=audit` with the same data says more)"
        )


def matching(pattern: str) -> list[Path]:
    """What a glob matches, in name order. What is there under the very name is that, brackets and
    all; so are the folders that lead to the pattern."""
    path = Path(pattern)
    if os.path.lexists(path):
        return [path]
    there = next((folder for folder in path.parents if os.path.isdir(folder)), Path())
    rest = str(path.relative_to(there))
    return sorted(there / name for name in glob.glob(rest, root_dir=there))


def expand(pattern: str, setting: str) -> list[Path]:
    """Files of a glob, in name order; UserError if there are none."""
    files = matching(pattern)
    if not files:
        raise UserError(f"{setting}={pattern}: no such file")
    return files


def from_shards(train_glob: str | None, val_glob: str, tokenizer: str) -> Source:
    """The user's own shards in the challenge's format; no training files are needed to score."""
    train_files = _shards(train_glob, "data.train_files") if train_glob else []
    val_files = _shards(val_glob, "data.val_files")
    for val, train in product(val_files, train_files):
        if val.resolve() == train.resolve() or _is_copy(val, train):
            raise UserError(f"data.val_files={val_glob}: {val.name} is training text too, {train}")
    path = Path(tokenizer)
    _check_notes(train_files + val_files, path)
    return Source(train_files, val_files, path, {"name": "shards"}, {})


def _shards(pattern: str, setting: str) -> list[Path]:
    """Shards of a glob, of one kind as far as names tell. Counts of bytes beside them have a
    shard's header and are left out."""
    files = expand(pattern, setting)
    sidecars = [
        file
        for file in files
        if (found := SIDECAR.fullmatch(file.stem))
        and file.with_stem(found[1] + (found[2] or "")).is_file()
    ]
    if sidecars:
        names = ", ".join(file.name for file in sidecars[:3])
        _warn(f"{setting}={pattern}: {names} not read: bytes of each token, not tokens")
    shards = [file for file in files if file not in sidecars]
    if not shards:
        raise UserError(f"{setting}={pattern}: no tokens among these files; name the shards")
    kinds = sorted({re.sub(r"\d+$", "", file.stem) for file in shards if file.stem[-1].isdigit()})
    if len(kinds) > 1:
        raise UserError(
            f"{setting}={pattern}: shards of {len(kinds)} kinds, "
            f"{' and '.join(f'{kind}*' for kind in kinds[:3])}; name one kind"
        )
    return shards


def _warn(line: str) -> None:
    """On the console of a run, whose handlers the log has, else on stderr."""
    if log.handlers and not log.disabled:
        log.warning("warning: %s", line)
    elif machine.rank() == 0:
        print(f"warning: {line}", file=sys.stderr)


def _is_copy(one: Path, other: Path) -> bool:
    """Byte by byte, if they are of one size. UserError if they cannot be read."""
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


def _check_notes(files: list[Path], tokenizer: Path) -> None:
    """Shards made here say which tokenizer made them; another one is an error."""
    for folder in {file.parent for file in files}:
        expected = _noted_tokenizer(folder / NOTES_FILE)
        if expected is not None and Tokenizer(tokenizer).sha256 != expected:
            raise UserError(
                f"data.tokenizer={tokenizer}: another tokenizer made the shards in {folder}"
            )


def _noted_tokenizer(notes: Path) -> str | None:
    """Hash of the tokenizer that our notes name; None if there are none or they are not ours."""
    try:
        found = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("tokenizer_sha256") if isinstance(found, dict) else None


def from_web_bible(vocab_size: int, val_fraction: float, cache_dir: Path) -> Source:
    """The embedded default corpus."""
    content = corpus.BIBLE_SHA256
    return _from_documents(
        "web_bible", content, {}, corpus.web_bible, vocab_size, val_fraction, cache_dir
    )


def from_text(
    files: list[str],
    vocab_size: int,
    val_fraction: float,
    cache_dir: Path,
    text_column: str = "text",
) -> Source:
    """Any .txt, .jsonl or .parquet files (globs are expanded, a file is read once).

    UserError for two with the same content.
    """
    found: dict[Path, Path] = {}
    for path in chain.from_iterable(expand(pattern, "data.files") for pattern in files):
        found.setdefault(path.resolve(), path)
    paths = list(found.values())
    corpus.check_files(paths)
    hashes = {str(path.absolute()): corpus.content_sha256(path) for path in paths}
    holding: dict[str, str] = {}  # content -> file
    for name, sha256 in hashes.items():
        if (other := holding.setdefault(sha256, name)) != name:
            raise UserError(f"data.files: {other} and {name} hold the same text; name one of them")
    content = json.dumps(
        [text_column, *zip(map(corpus.kind_of, paths), hashes.values(), strict=True)]
    )
    return _from_documents(
        "text",
        content,
        hashes,
        lambda: corpus.text_documents(paths, text_column),
        vocab_size,
        val_fraction,
        cache_dir,
    )


def from_cache(identity: dict[str, Any], cache_dir: Path) -> Source | None:
    """The source an artifact's header names, if its prepared shards are still in the cache."""
    key = str(identity.get("cache_key"))
    if not CACHE_KEY.fullmatch(key) or not os.path.isfile(cache_dir / key / NOTES_FILE):
        return None
    return _prepared(cache_dir / key, identity, {})


def is_validation(text: str, val_fraction: float) -> bool:
    """The side of a document: a function of its content alone."""
    digest = hashlib.sha256(text.encode()).digest()[:SPLIT_HASH_BYTES]
    return int.from_bytes(digest, "big") < val_fraction * 2 ** (8 * SPLIT_HASH_BYTES)


def _from_documents(
    name: str,
    content: str,
    files: dict[str, str],
    documents: corpus.Documents,
    vocab_size: int,
    val_fraction: float,
    cache_dir: Path,
) -> Source:
    key_parts = [LAYOUT, content, vocab_size, val_fraction, _sentencepiece_version()]
    key = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:16]
    identity = {"name": name, "cache_key": key, "val_fraction": val_fraction}
    folder = cache_dir / key
    # Not Path.is_file, which fails in a folder that is not ours to look into.
    if os.path.isfile(folder / NOTES_FILE):  # perhaps in a folder of somebody else, to read only
        return _prepared(folder, identity, files)
    temporary = cache_dir / f"{key}.tmp"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # which may name a parent
        raise _not_writable(cache_dir, error) from None
    try:
        with _locked(cache_dir, key):
            if not (folder / NOTES_FILE).is_file():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                try:
                    _prepare(name, documents, vocab_size, val_fraction, temporary)
                    shutil.rmtree(folder, ignore_errors=True)
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        is_here = error.filename and Path(error.filename).is_relative_to(cache_dir)
        if error.errno in FULL or is_here:
            raise _not_writable(cache_dir, error) from None
        raise
    return _prepared(folder, identity, files)


def _not_writable(cache_dir: Path, error: OSError) -> UserError:
    return UserError(f"data.cache_dir={cache_dir}: cannot write there ({error.strerror})")


def _locked(cache_dir: Path, key: str) -> filelock.AcquireReturnProxy:
    """Held by this process. UserError where files cannot be locked."""
    try:
        return filelock.FileLock(cache_dir / f"{key}.lock").acquire()
    except (OSError, NotImplementedError) as error:  # a network file system that knows no flock
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        raise UserError(f"data.cache_dir={cache_dir}: cannot lock files there ({error})") from None


def _sentencepiece_version() -> str:
    return metadata.version("sentencepiece")


def _prepared(folder: Path, identity: dict[str, Any], files: dict[str, str]) -> Source:
    try:
        notes = json.loads((folder / NOTES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.cache_dir: remove {folder}: {NOTES_FILE} is damaged ({error})"
        ) from None
    train_files, val_files = (
        expand(str(folder / f"{side}_*.bin"), "data") for side in ("train", "val")
    )
    source = Source(train_files, val_files, folder / "tokenizer.model", identity, notes, files)
    if notes.get("byte_characters"):
        log.info(
            "%s: %s of %s characters, %.2g %% of the text, are rare and spelled in bytes",
            source.setting("train"),
            f"{notes['byte_characters']:,}",
            f"{notes['characters']:,}",
            100 * notes["byte_characters_share"],
        )
    return source


def _prepare(
    name: str, documents: corpus.Documents, vocab_size: int, val_fraction: float, folder: Path
) -> None:
    """Tokenizer, shards and notes of one corpus into ``folder``."""

    def train_side() -> Iterator[str]:
        return (t for t in documents() if not is_validation(t, val_fraction))

    if next(iter(train_side()), None) is None:
        raise UserError(f"{_typed(name)}: there is no text to train on; give more, or other files")
    first = _FirstBytes(train_side(), TOKENIZER_BYTES)
    # Read before SentencePiece is at work, which would say that its own training went wrong.
    tokenizer, notes = train_tokenizer(list(first), vocab_size, folder / "tokenizer.model")
    notes |= write_shards(name, documents, tokenizer, val_fraction, folder)
    if first.num_bytes < notes["train_bytes"]:
        log.info(
            "%s: the tokenizer was trained on the first %s of %s bytes of training text, in "
            "the order of its documents",
            _typed(name), f"{first.num_bytes:,}", f"{notes['train_bytes']:,}",
        )  # fmt: skip
    (folder / NOTES_FILE).write_text(json.dumps(notes, indent=1), encoding="utf-8")


def write_shards(
    name: str,
    documents: corpus.Documents,
    tokenizer: Tokenizer,
    val_fraction: float,
    folder: Path,
) -> dict[str, Any]:
    """Shards of both sides into ``folder``; the notes on them. UserError if a side is empty or its
    bytes do not add up."""
    notes: dict[str, Any] = {"tokenizer_sha256": tokenizer.sha256}
    writers = {side: ShardWriter(folder, side) for side in ("train", "val")}
    for side in writers:
        notes |= {f"{side}_documents": 0, f"{side}_bytes": 0}
    sample = bytearray()
    counted = dict.fromkeys(writers, 0)
    for side, texts in _batches(documents(), val_fraction):
        ids = chain.from_iterable(tokenizer.encode_documents(texts))
        tokens = np.fromiter(ids, np.uint16)
        raw = "".join(texts).encode()
        notes[f"{side}_documents"] += len(texts)
        notes[f"{side}_bytes"] += len(raw)
        if side == "val" and len(sample) < YARDSTICK_BYTES:
            sample += raw[: YARDSTICK_BYTES - len(sample)]
        writers[side].write(tokens)
        counted[side] += tokenizer.count_bytes(tokens)
    for writer in writers.values():
        writer.close()
    for side, writer in writers.items():
        if not writer.num_tokens:
            raise UserError(
                f"{_typed(name)}: no document falls on the {side} side "
                f"({notes['train_documents'] + notes['val_documents']} in all, "
                f"data.val_fraction = {val_fraction}); give more text or another fraction"
            )
        if counted[side] != notes[f"{side}_bytes"]:
            raise UserError(
                f"{_typed(name)}: the tokens of the {side} side count {counted[side]} bytes, its "
                f"text has {notes[f'{side}_bytes']}: this vocabulary cannot count bytes; try "
                "another model.vocab_size"
            )
        notes[f"{side}_tokens"] = writer.num_tokens
    notes["val_xz_bits_per_byte"] = 8 * len(lzma.compress(bytes(sample), preset=9)) / len(sample)
    return notes


class _FirstBytes:
    """Texts until there are ``limit_bytes`` of them; ``num_bytes``: how many were taken."""

    def __init__(self, texts: Iterable[str], limit_bytes: int) -> None:
        self.texts, self.limit_bytes, self.num_bytes = texts, limit_bytes, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.num_bytes += len(text.encode())
            yield text
            if self.num_bytes >= self.limit_bytes:
                return


def _batches(documents: Iterable[str], val_fraction: float) -> Iterator[tuple[str, list[str]]]:
    """A side and documents of it, in order; bounded by bytes, as documents may have any number of
    them."""
    texts: dict[str, list[str]] = {"train": [], "val": []}
    num_bytes = dict.fromkeys(texts, 0)
    for text in documents:
        side = "val" if is_validation(text, val_fraction) else "train"
        texts[side].append(text)
        num_bytes[side] += len(text.encode())
        if num_bytes[side] >= BATCH_BYTES:
            yield side, texts[side]
            texts[side], num_bytes[side] = [], 0
    yield from ((side, left) for side, left in texts.items() if left)


def _cache_dir(data: DataSettings) -> Path:
    return Path(data.cache_dir).expanduser()


def absolute_paths(data: DataSettings) -> DataSettings:
    """The same files, wherever they are asked for from later."""
    named = ("train_files", "val_files", "tokenizer")
    absolute = {key: os.path.abspath(value) for key in named if (value := getattr(data, key))}
    files = [os.path.abspath(file) for file in data.files] if data.files else data.files
    cache_dir = os.path.abspath(_cache_dir(data))
    return replace(data, files=files, cache_dir=cache_dir, **absolute)


def from_settings(data: DataSettings, vocab_size: int) -> Source:
    """The source that settings name: given shards, else given files, else ``data.source``."""
    if data.train_files or data.val_files or data.tokenizer:
        for name in ("val_files", "tokenizer"):
            if not getattr(data, name):
                raise UserError(
                    f"data.{name} is missing: shards need data.val_files and data.tokenizer"
                )
        assert data.val_files
        assert data.tokenizer
        return from_shards(data.train_files, data.val_files, data.tokenizer)
    if data.files:
        return from_text(
            data.files, vocab_size, data.val_fraction, _cache_dir(data), data.text_column
        )
    if data.source == "text":
        raise UserError("data=text: give data.files='[a.txt,b.jsonl]'")
    if data.source == "web_bible":
        return from_web_bible(vocab_size, data.val_fraction, _cache_dir(data))
    return from_hub(data.repo_id, data.revision, data.dataset, data.train_shards)


def from_named(identity: dict[str, Any], data: DataSettings, vocab_size: int) -> Source:
    """The source an artifact's header names, found again; UserError says which settings to give."""
    if found := from_cache(identity, _cache_dir(data)):
        return found
    named = {key: value for key, value in identity.items() if isinstance(value, str)}
    if named.get("name") == "web_bible":
        return from_web_bible(vocab_size, data.val_fraction, _cache_dir(data))
    if named.get("name") == "hub" and {"repo_id", "revision", "dataset"} <= named.keys():
        return from_hub(named["repo_id"], named["revision"], named["dataset"], 1)
    raise UserError(
        "the artifact's validation text is not on this machine; "
        "give data.val_files=GLOB and data.tokenizer=PATH, or data.files='[...]'"
    )


LISTING_TIMEOUT_SECONDS = 20


def from_hub(repo_id: str, revision: str, dataset: str, train_shards: int) -> Source:
    """The first ``train_shards`` training shards, all validation shards and the tokenizer.

    ``dataset`` is a family such as ``fineweb10B_sp1024``; its tokenizer is
    ``fineweb_1024_bpe.model``. UserError when the hub cannot be reached (with the command that
    fetches by hand) or has no such files.
    """
    import huggingface_hub

    vocab = re.search(r"sp(\d+)$", dataset)
    tokenizer_name = f"fineweb_{vocab[1]}_bpe.model" if vocab else ""
    where = f"data.repo_id={repo_id} data.revision={revision}"
    try:
        names = _repository_files(repo_id, revision)
        tokenizers = [name for name in names if name.endswith(f"/{tokenizer_name}")]
        train = [
            n for n in names if re.search(rf"/{re.escape(dataset)}/fineweb_train_\d+\.bin$", n)
        ]
        val = [n for n in names if re.search(rf"/{re.escape(dataset)}/fineweb_val_\d+\.bin$", n)]
        if not (vocab and tokenizers and train and val):
            raise UserError(f"data.dataset={dataset}: {where} has no such shards and tokenizer")
        if len(train) < train_shards:
            raise UserError(
                f"data.train_shards = {train_shards}: {repo_id} has only {len(train)} of {dataset}"
            )

        def fetch(name: str) -> Path:
            return Path(
                huggingface_hub.hf_hub_download(
                    repo_id, name, repo_type="dataset", revision=revision
                )
            )

        return Source(
            [fetch(name) for name in train[:train_shards]],
            [fetch(name) for name in val],
            fetch(tokenizers[0]),
            _identity(repo_id, revision, dataset),
            {},
        )
    except UserError:
        raise
    except Exception as error:  # the hub's HTTP library, and so its errors, differ by version
        if isinstance(error, OSError) and error.errno in (*FULL, *NOT_OURS):
            raise UserError(
                f"data.dataset={dataset}: cannot write {error.filename or 'its files'}: "
                f"{error.strerror}; HF_HOME says where they go"
            ) from None
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"data.dataset={dataset}: cannot fetch from the hub ({reason}); on a connected machine "
            f"run `hf download {repo_id} --repo-type dataset --revision {revision} "
            f"--include '*{dataset}*' --include '*{tokenizer_name}'`, copy its cache here, or give "
            "data.train_files, data.val_files and data.tokenizer"
        ) from None


def _identity(repo_id: str, revision: str, dataset: str) -> dict[str, Any]:
    return {"name": "hub", "repo_id": repo_id, "revision": revision, "dataset": dataset}


def _repository_files(repo_id: str, revision: str) -> list[str]:
    """All file names, from the hub or, offline, from what is already in the local cache."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(
            repo_id, revision=revision, timeout=LISTING_TIMEOUT_SECONDS
        )
        return sorted(sibling.rfilename for sibling in info.siblings or [])
    except Exception as unreachable:
        try:
            snapshot = Path(
                huggingface_hub.snapshot_download(
                    repo_id, repo_type="dataset", revision=revision, local_files_only=True
                )
            )
        except Exception:
            raise unreachable from None
        return sorted(str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file())
