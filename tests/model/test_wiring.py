"""Which weight does what, found in models whose parts are called anything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.model.registry import empty_model, last_logits, tensor_shapes
from qat.model.spec import ModelSpec, architectures
from qat.model.wiring import Watch, wiring_in, wiring_of


class Odd(nn.Module):
    """A bare matrix, a layer used twice, a bias, positions, names that say nothing."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.z = nn.Linear(8, 8)
        self.a = nn.Embedding(20, 8)
        self.b = nn.Embedding(16, 8)
        self.list = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.bare = nn.Parameter(torch.randn(8, 8))
        self.gain = nn.Parameter(torch.ones(8))
        self.idle = nn.Parameter(torch.ones(3, 3))
        self.out = None if is_tied else nn.Linear(8, 20, bias=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.a(ids) + self.b(torch.arange(ids.size(1), device=ids.device))
        for layer in self.list:
            x = self.z(layer(x)) * self.gain
        x = F.linear(x, weight=self.bare)
        return F.linear(x, self.a.weight) if self.out is None else self.out(x)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_roles_are_found_by_use(is_tied: bool, device: str) -> None:
    found = wiring_in(Odd(is_tied).to(device))
    assert found.lookups == ("a.weight", "b.weight")
    assert found.matrices == ("list.0.0.weight", "z.weight", "list.1.0.weight", "bare")
    assert found.head == ("a.weight" if is_tied else "out.weight")
    assert found.is_tied is is_tied
    assert found.blocks == (("list.0.0.weight",), ("z.weight",), ("list.1.0.weight",), ("bare",))
    assert found.ends == (("b.weight", "a.weight") if is_tied else (*found.lookups, found.head))


def test_a_head_that_is_no_matrix_is_refused() -> None:
    class Headless(Odd):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
            return super().forward(ids).mean(-1, keepdim=True)

    with pytest.raises(ValueError, match="the last matrix is not the head"):
        wiring_in(Headless(True))


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_baselines_is_that_of_its_names(is_tied: bool) -> None:
    spec = ModelSpec(64, 3, 32, 4, 2, 2, is_tied)
    found = wiring_of(spec)
    layers = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    assert found.blocks == tuple(
        tuple(f"blocks.{i}.{layer}.weight" for layer in layers) for i in range(3)
    )
    assert found.matrices == tuple(name for block in found.blocks for name in block)
    every = {name for name in tensor_shapes(spec) if name.endswith(".weight")}
    assert every == {*found.matrices, *found.ends}
    assert (found.lookups, found.head) == (
        ("tok_emb.weight",), "tok_emb.weight" if is_tied else "lm_head.weight",
    )  # fmt: skip


@pytest.mark.parametrize("name", architectures())
def test_blocks_hold_every_matrix_once(name: str) -> None:
    spec = ModelSpec(64, 3, 32, 4, 2, 2, True, name)
    found = wiring_of(spec)
    assert sorted(name for block in found.blocks for name in block) == sorted(found.matrices)
    assert {*found.matrices, *found.ends} <= set(tensor_shapes(spec))


def test_what_is_watched_changes_no_number() -> None:
    torch.manual_seed(0)
    model, ids = Odd(True), torch.randint(0, 20, (2, 9))
    seen: list[str] = []
    with Watch(dict(model.named_parameters()), lambda name, x, is_lookup: seen.append(name)):
        watched = model(ids)
    assert watched.equal(model(ids))
    assert len(seen) == 8
    assert seen[-1] == "a.weight"


@pytest.mark.parametrize("name", architectures())
@torch.inference_mode()
def test_the_last_logits_come_with_and_without_a_tail(name: str) -> None:
    spec = ModelSpec(64, 2, 32, 4, 2, 2, True, name)
    torch.manual_seed(0)
    weights = {n: 0.3 * torch.randn(shape) for n, shape in tensor_shapes(spec).items()}
    model, ids = empty_model(spec), torch.arange(32).view(2, 16)
    whole = last_logits(model, weights, ids, None)
    assert whole.shape == (2, 16, 64)
    for tail in (1, 5, 16):
        assert last_logits(model, weights, ids, tail).allclose(whole[:, -tail:], atol=1e-5)


def test_a_model_that_is_called_with_anything() -> None:
    """Several tensors, no head, and attention of torch's own, layer by layer."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.other = nn.Embedding(5, 8)
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return self.out(self.layer(x).mean(1) + self.other(ids))

    for inputs in ((torch.ones(2, 3, 8), torch.ones(2, dtype=torch.long)),
                   {"ids": torch.ones(2, dtype=torch.long), "x": torch.ones(2, 3, 8)}):  # fmt: skip
        found = wiring_in(Cross().eval(), inputs)
        assert found.head is None
        assert found.lookups == found.ends == ("other.weight",)
        assert found.matrices == (
            "layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight",
            "layer.linear1.weight", "layer.linear2.weight", "out.weight",
        )  # fmt: skip
