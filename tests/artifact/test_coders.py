"""Every coder gives back what it was given, the same bytes everywhere, and never too many."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.artifact import class_coder, mix_coder
from qat.artifact.coder import AUTO, CODERS, GENERAL, check_coder, encode_section
from qat.artifact.sections import Matrix
from qat.compiled import machine_code
from qat.errors import UserError
from tests.conftest import ROOT, first_on_path


def draw_codes(seed: int, matrices: list[Matrix]) -> bytes:
    """Codes with scales of their own in rows and columns, as trained weights have them."""
    chooser = np.random.default_rng(seed)
    parts = []
    for m in matrices:
        largest = min(2**m.bits - 1, 127)
        rows = np.exp(0.3 * chooser.normal(size=(m.rows, 1)))
        columns = np.exp(0.3 * chooser.normal(size=(1, m.columns)))
        values = chooser.normal(size=(m.rows, m.columns)) * rows * columns * largest / 5
        codes = np.clip(np.rint(values), -largest, largest).astype(np.int8)
        if m.is_sign_magnitude:
            codes = np.where(codes < 0, -codes.astype(np.int16) - 128, codes).astype(np.int8)
        parts.append(codes.tobytes())
    return b"".join(parts)


some_matrices = st.lists(
    st.builds(
        Matrix, st.integers(0, 40), st.integers(0, 40), st.integers(1, 7), st.booleans(),
        st.sampled_from(["a", "b", *map(str, range(20))]),
    ),
    max_size=6,
)  # fmt: skip


@pytest.mark.parametrize("coder", CODERS)
@given(some_matrices, st.integers(0, 999))
def test_round_trip(coder: str, matrices: list[Matrix], seed: int) -> None:
    raw = draw_codes(seed, matrices)
    coded = CODERS[coder].encode(raw, matrices)
    assert CODERS[coder].encode(raw, matrices) == coded
    assert CODERS[coder].decode(coded, len(raw), matrices) == raw


@given(st.binary(max_size=4000), st.integers(0, 99))
def test_mix_codes_anything_that_fits_its_bits(data: bytes, seed: int) -> None:
    """No code is out of reach, however unlikely its model finds it."""
    columns = 1 + seed
    rows = len(data) // columns
    raw = data[: rows * columns]
    matrices = [Matrix(rows, columns, 8, False, "x")]
    assert CODERS["mix"].decode(CODERS["mix"].encode(raw, matrices), len(raw), matrices) == raw


@pytest.mark.parametrize("coder", CODERS)
def test_damaged_sections_never_grow_and_never_crash(coder: str) -> None:
    matrices = [Matrix(30, 40, 5, False, "w"), Matrix(7, 9, 5, False, "v")]
    raw = draw_codes(3, matrices)
    coded = CODERS[coder].encode(raw, matrices)
    chooser = np.random.default_rng(0)
    for number in range(200):
        bad = bytearray(coded)
        if number % 2:
            bad[chooser.integers(len(bad))] ^= 1 << chooser.integers(8)
        else:
            del bad[chooser.integers(len(bad)) :]
        try:
            back = CODERS[coder].decode(bytes(bad), len(raw), matrices)
        except ValueError:
            continue
        assert len(back) == len(raw)


@pytest.mark.slow
@pytest.mark.parametrize("coder", [name for name in CODERS if name != "mix"])
def test_a_bomb_stops_at_the_declared_size(coder: str) -> None:
    bomb = CODERS[coder].encode(bytes(50_000_000), [])
    assert len(bomb) < 60_000
    with pytest.raises(ValueError, match="declared size"):
        CODERS[coder].decode(bomb, 1000, [])


def test_auto_is_never_larger_than_any_and_mix_wins_on_weights() -> None:
    matrices = [Matrix(200, 300, 5, False, f"blocks.*.{i % 2}") for i in range(4)]
    raw = draw_codes(1, matrices)
    sizes = {name: len(coder.encode(raw, matrices)) for name, coder in CODERS.items()}
    name, coded = encode_section(raw, matrices, "auto")
    assert len(coded) == min(sizes.values())
    assert name == "mix"
    assert sizes["mix"] < 0.98 * min(sizes[name] for name in GENERAL)
    assert sizes["mix"] < sizes["constriction"] < 0.99 * min(sizes[name] for name in GENERAL)
    assert encode_section(bytes(3000), [], "mix")[0] != "mix"  # no codes to model


def test_streams_and_threads_change_nothing_but_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix_coder, "STREAM_CODES", 3000)
    matrices = [Matrix(50, 40, 5, False, str(i)) for i in range(7)]
    raw = draw_codes(2, matrices)
    coded = mix_coder.encode(raw, matrices)
    pool = mix_coder.ThreadPoolExecutor
    for threads in (1, 3):
        monkeypatch.setattr(mix_coder, "ThreadPoolExecutor", lambda n=threads: pool(n))
        assert mix_coder.encode(raw, matrices) == coded
        assert mix_coder.decode(coded, len(raw), matrices) == raw


WITHOUT_COMPILER = """
import sys
from pathlib import Path
from qat.artifact import mix_coder
from tests.artifact.test_coders import Matrix, draw_codes
matrices = [Matrix(20, 30, 6, False, "a"), Matrix(10, 20, 3, True, "b")]
assert not hasattr(mix_coder.code_tensor, "py_func")
coded = sys.stdin.buffer.read()
raw = draw_codes(4, matrices)
assert mix_coder.decode(coded, len(raw), matrices) == raw
assert mix_coder.encode(raw, matrices) == coded
"""


@pytest.mark.slow
def test_without_the_compiler_the_bytes_are_the_same() -> None:
    matrices = [Matrix(20, 30, 6, False, "a"), Matrix(10, 20, 3, True, "b")]
    coded = mix_coder.encode(draw_codes(4, matrices), matrices)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_COMPILER], input=coded, cwd=ROOT,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def test_the_bytes_of_version_2_never_change() -> None:
    """A file written today is read for ever: the model may not drift."""
    matrices = [Matrix(60, 70, 7, False, "a"), Matrix(30, 70, 7, False, "b")]
    thirds = np.random.default_rng(5).integers(-42, 43, size=(3, 90 * 70))
    coded = mix_coder.encode(thirds.sum(0).astype(np.int8).tobytes(), matrices)
    assert (len(coded), hashlib.sha256(coded).hexdigest()[:16]) == (5951, "3cb49c595fa2033a")
    coded = class_coder.encode(thirds.sum(0).astype(np.int8).tobytes(), matrices)
    assert (len(coded), hashlib.sha256(coded).hexdigest()[:16]) == (6729, "167111a4bc0e66df")


@pytest.mark.slow
def test_torch_and_numpy_alone_write_and_read_a_file(tmp_path: Path) -> None:
    """Coders import their libraries when needed; one that is missing is one line."""
    program = """
import sys
from pathlib import Path
for name in ("brotli", "zstandard", "constriction", "numba", "lightning", "hydra", "omegaconf",
             "scipy", "filelock", "rich", "sentencepiece"):
    sys.modules[name] = None  # as if it were not installed
from pathlib import Path
import torch
from qat.artifact.container import pack, read_artifact, write_whole
from qat.errors import UserError
from qat.quantize.grid import Grid
from qat.quantize.plan import build_plan
plan = build_plan({"w": (8, 4)}, {"grid": Grid(bits=6)}, {"*": "grid"})
encoded = plan.encode({"w": torch.ones(8, 4)})
path = Path("a.qat")
write_whole(path, pack(encoded, plan, {}, "zlib"))
assert torch.equal(read_artifact(path).weights["w"], plan.snap({"w": torch.ones(8, 4)})["w"])
for coder in sys.argv[2:]:
    try:
        pack(encoded, plan, {}, coder)
    except UserError as error:
        assert "is not installed" in str(error) and "pip install -e '.[train]'" in str(error), error
    else:
        raise AssertionError(coder)
forged = pack(encoded, plan, {}, "zlib").replace(b'"codes","zlib"', b'"codes","zstd"')
import hashlib
path.write_bytes(forged[:-32] + hashlib.sha256(forged[:-32]).digest())
try:
    read_artifact(path)
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "", *(name for name in CODERS if name != "zlib"), "auto"],
        cwd=tmp_path, env=os.environ | first_on_path(ROOT), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("zstandard is not installed")


def test_codes_without_room_are_coded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [Matrix(50, 40, 5, False, str(i)) for i in range(7)]
    raw = draw_codes(2, matrices)
    coded, runs, run = mix_coder.encode(raw, matrices), [], mix_coder._run

    def counted(*args, **kwargs):
        runs.append(len(args[2]))
        return run(*args, **kwargs)

    monkeypatch.setattr(mix_coder, "_run", counted)
    for share in (0.9, 0.5, 0.01, 0.0):  # of the bytes that the codes take
        monkeypatch.setattr(mix_coder, "USUAL_BYTES", share * len(coded) / len(raw))
        assert mix_coder.encode(raw, matrices) == coded
        assert len(runs) == 2
        runs.clear()


def test_encoding_takes_no_room_for_the_worst() -> None:
    matrices = [Matrix(1000, 1000, 8, False, "w")]
    raw = np.random.default_rng(0).integers(-127, 128, 1_000_000, np.int8).tobytes()
    mix_coder.encode(raw[:1000], [Matrix(1, 1000, 8, False, "w")])  # compiles, makes its tables
    tracemalloc.start()
    mix_coder.encode(raw, matrices)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    model = sum(array.nbytes for array in mix_coder.new_model())
    assert most < 7 * len(raw) + model


@pytest.mark.parametrize(
    ("coder", "library"),
    [("mix", "brotli"), ("mix", "zstandard"), ("zstd", "zstandard"), (AUTO, "brotli")],
)
def test_what_a_file_takes_is_tried_before_a_training(
    coder: str, library: str, monkeypatch: pytest.MonkeyPatch, train
) -> None:
    """The floats of a ``mix`` file are coded by whatever is smallest."""
    check_coder(coder)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"{library} is not installed"):
        check_coder(coder)
    done = train(f"artifact.coder={coder}", "run_name=r")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert not Path("logs").exists()


def test_numba_works_without_a_place_for_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only install without a home, and a disk that is full while it is saved."""
    from numba.core import caching

    def twice(x):
        return 2 * x

    with monkeypatch.context() as patched:
        patched.setattr(caching.CodeLibraryCacheImpl, "_locator_classes", [])
        patched.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
        assert machine_code(twice)(21) == 42

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert machine_code(twice)(21) == 42
