"""Texts -> tokens, in as many processes as there are cores.

The number of processes changes nothing that comes out: batches keep their order, and the tokens of
one are a function of its texts. Processes, because SentencePiece holds Python's lock: two threads
take as long as one. They are started as a program, not by ``multiprocessing``, which would run the
caller's script again. A few batches are in memory at any time, however much text there is.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch

from qat.errors import UserError
from qat.text.tokenizer import Tokenizer

FEW_BATCHES = 32  # are encoded sooner than another process has started
AHEAD = 3  # batches in the works for each process, so that none waits
MAX_PROCESSES = 16


class SideTexts(NamedTuple):
    """Documents of one side, ``train`` or ``val``."""

    side: str
    texts: list[str]


class SideTokens(NamedTuple):
    tokens: np.ndarray  # uint16, each document after its BOS
    num_bytes: int  # of the text that they stand for


def num_processes() -> int:
    """One for each core that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES)


def encode_batches(
    tokenizer: Tokenizer, batches: Iterable[SideTexts], processes: int
) -> Iterator[tuple[SideTexts, SideTokens]]:
    """Every batch with its tokens, in order. UserError if a process dies."""
    left = iter(batches)
    first = list(islice(left, FEW_BATCHES))
    left = chain(first, left)
    if processes == 1 or len(first) < FEW_BATCHES:
        for batch in left:
            yield batch, _encode(tokenizer, batch.texts)
        return
    works: deque[tuple[SideTexts, Future[SideTokens]]] = deque()
    with ExitStack() as stack:
        idle: SimpleQueue[_Process] = SimpleQueue()
        for _ in range(processes):
            idle.put(stack.enter_context(_Process(tokenizer.path)))
        threads = stack.enter_context(ThreadPoolExecutor(processes))

        def encode_there(texts: list[str]) -> SideTokens:
            process = idle.get()
            try:
                return process.encode(texts)
            finally:
                idle.put(process)

        for batch in left:
            works.append((batch, threads.submit(encode_there, batch.texts)))
            if len(works) == AHEAD * processes:
                done, future = works.popleft()
                yield done, future.result()
        for done, future in works:
            yield done, future.result()


def _encode(tokenizer: Tokenizer, texts: list[str]) -> SideTokens:
    tokens = np.array([i for ids in tokenizer.encode_documents(texts) for i in ids], np.uint16)
    return SideTokens(tokens, tokenizer.count_bytes(tokens))


class _Process:
    """This module as a program: lists of texts in, ``SideTokens`` out, until there are no more."""

    def __init__(self, tokenizer: Path) -> None:
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        self.program = subprocess.Popen(
            [sys.executable, "-m", __name__, str(tokenizer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # what is typed on the terminal ends us, and we end it
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.kill()
        with suppress(BrokenPipeError), self.program:  # closes the pipes and waits
            pass

    def encode(self, texts: list[str]) -> SideTokens:
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        try:
            pickle.dump(texts, self.program.stdin)
            self.program.stdin.flush()
            return SideTokens(*pickle.load(self.program.stdout))
        except (EOFError, OSError, pickle.UnpicklingError):
            raise UserError(
                "data: a process that turns text into tokens died; was there enough memory?"
            ) from None


def _serve(tokenizer: Tokenizer) -> None:
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            texts = pickle.load(sys.stdin.buffer)
        except EOFError:  # the process that asks has ended
            return
        pickle.dump(tuple(_encode(tokenizer, texts)), answers)
        answers.flush()


if __name__ == "__main__":
    _serve(Tokenizer(Path(sys.argv[1])))
