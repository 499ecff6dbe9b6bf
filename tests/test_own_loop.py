"""``QatModel`` in other loops: one like nanoGPT's, Hugging Face's models, two ranks."""

from __future__ import annotations

import copy
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qat import Grid, Plan, QatModel, load
from qat.errors import UserError
from qat.quantize import gradients
from tests.conftest import code_in, compiles

VOCAB, WIDTH, LENGTH = 64, 32, 16
INT4 = Grid(bits=4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class TinyGpt(nn.Module):
    """A block and a tied head, written as somebody would who never heard of this project."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.wte(ids)
        x = x + self.attn(self.norm(x))
        logits = self.lm_head(x + self.mlp(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch(seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (4, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def wrapped(grid: Grid = INT4, gradient: str = "identity", fused: bool = False) -> QatModel:
    torch.manual_seed(0)
    gpt = TinyGpt()
    plan = Plan.for_model(gpt, grid, rules={"mlp.*": Grid(bits=3)} if grid is INT4 else {})
    return QatModel(gpt, plan, gradient, fused=fused)


def train(model: nn.Module, updates: range, accumulate: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for number in updates:
        for micro in range(accumulate):
            loss = model(*batch(10 * number + micro)) / accumulate
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def logits_by_hand(model: QatModel, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """A plain module with these weights, nothing wrapped."""
    plain = TinyGpt()
    plain.load_state_dict(weights, strict=False)
    return plain(ids)


def test_off_it_is_the_plain_model_bit_for_bit() -> None:
    model, plain = wrapped(), copy.deepcopy(wrapped().model)
    assert train(model, range(4)) == train(plain, range(4))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_on_it_computes_with_the_weights_of_its_file(mode: str, tmp_path: Path) -> None:
    model = wrapped()
    train(model, range(3))
    model.qat(True)
    train(model, range(3, 8))
    getattr(model, mode)()
    ids, _ = batch(99)
    logits = model(ids)
    model.save(tmp_path / "model.qat")
    weights = load(tmp_path / "model.qat")
    assert "lm_head.weight" not in weights  # tied: stored once, under its first name
    assert torch.equal(logits, logits_by_hand(model, weights, ids))
    assert not torch.equal(logits, logits_by_hand(model, model.masters, ids))
    for name, seen in model.weights().items():
        assert torch.equal(seen, weights[name]), name
    on_grid = {entry.name for entry in model.plan.on_grid}
    assert on_grid == {"wte.weight", "attn.qkv.weight", "attn.out.weight", "mlp.0.weight",
                       "mlp.2.weight"}  # fmt: skip


def test_masters_are_snapped_once_an_update_whatever_moves_them() -> None:
    model = wrapped().qat(True)
    train(model, range(3), accumulate=4)
    assert model.liveness().num_snaps == 4  # it looks at the masters after the last update
    model(batch(0)[0])
    model(batch(1)[0])
    assert model.liveness().num_snaps == 4
    with torch.no_grad():
        model.masters["wte.weight"].mul_(2.0)
    assert torch.equal(model.weights()["wte.weight"], model.snapped()["wte.weight"])
    model.load_state_dict(wrapped().qat(True).state_dict())
    assert torch.equal(model.weights()["wte.weight"], wrapped().snapped()["wte.weight"])
    model.masters["wte.weight"].data.mul_(2.0)  # behind its back: said in the text
    model.refresh()
    assert torch.equal(model.weights()["wte.weight"], model.snapped()["wte.weight"])


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    one, many = wrapped().qat(True), wrapped().qat(True)
    ids, targets = (torch.cat(parts) for parts in zip(batch(1), batch(2), strict=True))
    one(ids, targets).backward()
    for number in (1, 2):
        (many(*batch(number)) / 2).backward()
    for name, master in one.masters.items():
        torch.testing.assert_close(many.masters[name].grad, master.grad, msg=name)


def test_the_straight_through_gradient_is_that_of_the_snapped_model() -> None:
    model = wrapped().qat(True)
    model(*batch(3)).backward()
    plain = TinyGpt()
    plain.load_state_dict(model.snapped(), strict=False)
    plain(*batch(3)).backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, model.masters[name].grad), name


def test_autocast_goes_around_the_call() -> None:
    model = wrapped().qat(True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch(0)[0])
        expected = logits_by_hand(model, model.snapped(), batch(0)[0])
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("grid", "gradient"),
    [
        (INT4, "identity"),
        (Grid(bits=4, scale_rule="learned", scale_floor=1e-3), "identity"),
        (INT4, "noise"),  # it draws by how often was snapped
        (INT4, "hold"),  # it remembers every weight's flips
    ],
)
def test_a_copy_and_a_state_dict_go_on_alike(
    grid: Grid, gradient: str, plug_in, tmp_path: Path
) -> None:
    plug_in(gradients, gradients.rule_kinds, "hold", code_in("add_a_gradient.md")[0])
    model = wrapped(grid, gradient).qat(True)
    train(model, range(3))
    twin, loaded = copy.deepcopy(model), wrapped(grid, gradient)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert twin.is_on
    assert loaded.is_on
    losses = [train(each, range(3, 6)) for each in (model, twin, loaded)]
    assert losses[0] == losses[1] == losses[2]
    for name, w in model.snapped().items():
        assert torch.equal(w, loaded.snapped()[name]), name


def test_a_copy_is_evaluated_whose_rule_does_something_beside_the_loss() -> None:
    model = wrapped(INT4, "cage").qat(True)
    ids = batch(0)[0]
    with torch.no_grad():
        logits = model(ids)
        assert torch.equal(copy.deepcopy(model)(ids), logits)


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("gradient", ["identity", pytest.param("clipped", marks=pytest.mark.slow)])
def test_compiled_nothing_recompiles_at_the_switch(gradient: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = wrapped(gradient=gradient)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, range(2))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.qat(True)
        train(compiled, range(2, 5))
    assert counters["stats"]["unique_graphs"] == graphs
    ids, _ = batch(5)
    torch.testing.assert_close(compiled(ids), logits_by_hand(model, model.snapped(), ids))
    torch._dynamo.reset()


def _rank(rank: int, port: int, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = wrapped().qat(True)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for number in range(3):
        ids, targets = batch(number)
        half = slice(2 * rank, 2 * rank + 2)
        parallel(ids[half], targets[half]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.snapped(), f"{out}/{rank}.pt")
    # Both have all they need; what holds the group goes before it, or ending may wait for ever.
    torch.distributed.barrier()
    del parallel
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Gradients meet in the masters: two halves of a batch move them as the whole one does."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    model = wrapped().qat(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(3):
        model(*batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, w in model.masters.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        if model.plan.entries[name].grid is None:
            torch.testing.assert_close(ranks[0][name], w.detach(), msg=name)
    # A sum in another order moves a scale by its last bits, and a weight over an edge.
    snapped = model.snapped().items()
    same = [torch.isclose(ranks[0][name], w, rtol=1e-4).float().mean() for name, w in snapped]
    assert min(same) > 0.9


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=compiles)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_loop_may_evaluate_between_update_and_forward_pass(fused: bool) -> None:
    """Under inference mode, whose tensors cannot be trained on."""
    plain, evaluated = (wrapped(fused=fused).qat(True) for _ in range(2))
    for number in range(3):
        with torch.inference_mode():
            evaluated(*batch(50))
        train(plain, range(number, number + 1))
        train(evaluated, range(number, number + 1))
    ids, targets = batch(60)
    assert torch.equal(plain(ids, targets), evaluated(ids, targets))


def test_loaded_masters_are_no_update_that_a_rule_missed() -> None:
    model = wrapped(gradient="cage").qat(True)
    before = model(*batch(1))
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.load_state_dict(state)
    assert torch.equal(model(*batch(1)), before)


def test_liveness_says_what_happens() -> None:
    model = wrapped()
    ids, targets = batch(0)
    off = model.liveness(ids)
    assert (off.is_on, off.num_snaps, off.unused) == (False, 0, [])
    assert off.on_grid_share < 0.5
    assert set(off.without_gradient) == {entry.name for entry in model.plan.on_grid}
    model.qat(True)(ids, targets).backward()
    on = model.liveness(ids)
    assert on == (True, 1, 1.0, [], [])


def test_liveness_names_a_weight_that_is_read_behind_its_back() -> None:
    """The planted fault: a bank of weights that no snapped copy reaches."""
    model = wrapped().qat(True)
    bank = model.model.attn.out.weight.detach().clone()
    attention = model.model.attn
    attention.out.forward = lambda x: x @ bank.T  # type: ignore[method-assign]
    attention.out._forward_pre_hooks.clear()
    attention.forward = lambda x: x @ bank.T  # type: ignore[method-assign]
    found = model.liveness(batch(0)[0])
    assert found.unused == ["attn.qkv.weight", "attn.qkv.bias", "attn.out.weight", "attn.out.bias"]
    assert found.on_grid_share < 1.0


def test_what_cannot_be_wrapped_is_refused(tmp_path: Path) -> None:
    gpt = TinyGpt()
    plan = Plan.for_model(gpt, INT4)
    with pytest.raises(ValueError, match=r"norm\.bias.*do not name the same tensors|attn"):
        QatModel(gpt.attn, plan)
    with pytest.raises(ValueError, match="masters are float32"):
        QatModel(TinyGpt().bfloat16(), plan)
    with pytest.raises(ValueError, match=r"lm_haed\*"):
        Plan.for_model(gpt, INT4, keep=["lm_haed*"])
    model = QatModel(gpt, plan)
    with torch.no_grad():
        model.masters["wte.weight"][3, 4] = math.nan
    with pytest.raises(ValueError, match=r"wte\.weight holds NaN"):
        model.save(tmp_path / "model.qat")
    assert not list(tmp_path.iterdir())
    (tmp_path / "bad.qat").write_bytes(b"QATMODEL" + bytes(64))
    with pytest.raises(UserError, match=r"bad\.qat"):
        load(tmp_path / "bad.qat")


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    if name == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **sizes)
        return transformers.LlamaForCausalLM(config)
    config = transformers.ModernBertConfig(
        num_labels=3, cls_token_id=1, sep_token_id=2, attn_implementation="eager", **sizes
    )
    return transformers.ModernBertForSequenceClassification(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_hugging_face_models_train_and_come_back(name: str, tmp_path: Path) -> None:
    inner = hugging_face(name)
    keep = ["classifier*"] if name == "modernbert" else []
    model = QatModel(inner, Plan.for_model(inner, Grid(bits=6), keep=keep))
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(2))
    labels = ids if name == "llama" else torch.tensor([0, 1, 2, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for number in range(8):
        if number == 4:
            model.qat(True)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    logits = model(input_ids=ids).logits
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    assert model.liveness(input_ids=ids) == (True, 5, 1.0, [], [])
    model.save(tmp_path / "model.qat")
    plain = hugging_face(name).eval()
    plain.load_state_dict(load(tmp_path / "model.qat"), strict=False)
    assert torch.equal(plain(input_ids=ids).logits, logits)
    kept = {entry.name for entry in model.plan if entry.grid is None}
    assert all("norm" in each or "classifier" in each or "bias" in each for each in kept), kept


@pytest.mark.parametrize("coder", ["zlib", "mix", "constriction"])
def test_scalars_and_parameters_without_elements_come_back(coder: str, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.none = nn.Linear(1, 1, bias=False), nn.Linear(0, 4)
            self.temperature = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.matrix(x) * self.temperature + self.none(torch.ones(0)).sum()

    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # torch on a layer without inputs
        odd = Odd()
    model = QatModel(odd, Plan.for_model(odd, INT4))
    model.qat(True)
    model(torch.ones(1, 1)).sum().backward()
    model.save(tmp_path / "odd.qat", coder=coder)
    weights = load(tmp_path / "odd.qat")
    assert weights["temperature"].equal(odd.temperature)
    assert weights["none.weight"].shape == (4, 0)
