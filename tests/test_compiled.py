"""What is compiled is kept, and counted, by key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from qat import compiled as module
from qat.compiled import compiled, forget, make_room
from tests.conftest import compiles

pytestmark = compiles


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    forget()
    yield
    forget()


def add(n: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def plus(x: torch.Tensor) -> torch.Tensor:
        return x + n

    return plus


def test_graphs_of_one_key_do_not_count_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GRAPHS", 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in range(4):
            for size in (3, 4):
                x = torch.zeros(size)
                assert torch.equal(compiled(n, lambda n=n: add(n))(x), x + n)
        with pytest.raises(FailOnRecompileLimitHit):
            compiled(0, lambda: add(0))(torch.zeros(5))


def test_one_model_may_have_any_number_and_the_next_makes_room() -> None:
    first = compiled(0, lambda: add(0))
    for n in range(1, module.MAX_KEPT):
        compiled(n, lambda n=n: add(n))
    compiled("more", lambda: add(1))
    assert compiled(0, lambda: add(0)) is first
    make_room()
    assert compiled(0, lambda: add(0)) is not first
