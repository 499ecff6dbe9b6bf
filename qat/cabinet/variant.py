"""What a variant is: one way to store a trained model, its bytes, and what it computes with.

The model may be any module whose matrices go through ``F.linear`` (``qat.model.wiring``). Libraries
that replace layers get the matrices but a language model's head. Embeddings, which are the head too
where it is tied, stay float32, as do an untied head and all vectors: libraries quantize
``nn.Linear`` only. What ``keep`` matches stays, in every variant, bit for bit as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qat.artifact.coder import encode_section
from qat.errors import UserError
from qat.model.registry import empty_model
from qat.model.spec import ModelSpec
from qat.model.wiring import Wiring, arguments, wiring_in, wiring_of
from qat.ptq.layer_inputs import LayerInputs
from qat.quantize.plan import kept_parameters


@dataclass(frozen=True)
class Kept:
    """What a variant makes of a model.

    ``module``: computes with what is kept: float32 weights, or a library's own tensors and layers.
    ``disk_bytes``: of a file, packed and entropy-coded, scales and zero points included.
    ``memory_bytes``: of all tensors as they are held to compute with them (``inner_bytes``).
    ``embedding``: how the first embedding is stored, as tables say it; None without any.
    """

    module: nn.Module
    disk_bytes: int
    memory_bytes: int
    embedding: str | None
    precision: str = "fp32"  # fp32 | bf16 (autocast): what it computes in


@dataclass(frozen=True)
class Variant:
    """A row of the table. ``missing`` returns why this machine cannot make it, or None.
    ``made_from``: SHA-256 of a file that it is made from, whose row is of no other file."""

    name: str
    family: str  # float | rounding | gptq | scaled | low rank | torchao | bitsandbytes | qat
    make: Callable[[], Kept]
    missing: Callable[[], str | None] = lambda: None
    made_from: str | None = None


def unmade(name: str, family: str, reason: str) -> Variant:
    """A row that no machine can make yet, and why."""

    def make() -> Kept:
        raise AssertionError(reason)

    return Variant(name, family, make, lambda: reason)


def failure(convert: Callable[[], nn.Module], model: Frozen) -> str | None:
    """Why a library cannot convert this model or compute with it: what it raises, in one line.

    Which shapes and machines its kernels take is known to the kernels alone, hence the attempt.
    """
    args, kwargs = arguments(model.probe)
    try:
        module = convert()
        with torch.inference_mode():
            module(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def inner_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """What is held: of a tensor subclass its inner tensors (its outer dtype and size are what it
    stands for), of any other tensor itself."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from inner_tensors(getattr(tensor, name) for name in names)
        else:
            yield tensor.detach()


def inner_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of storage of the inner tensors. Storage that is shared counts once."""
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in inner_tensors(tensors)}
    return sum(held.values())


def coded_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the inner tensors, one after another, through zstd: a library's file, compressed."""
    raw = b"".join(
        t.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for t in inner_tensors(tensors)
    )
    return len(encode_section(raw, (), "zstd")[1])


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy in evaluation mode that computes with these weights: it shares their storage, but
    never a parameter, which libraries change in place. Tied parameters stay tied."""
    placed = {
        id(parameter): nn.Parameter(weights[name], requires_grad=False)
        for name, parameter in module.named_parameters()
    }
    return copy.deepcopy(module, placed).eval()


class Frozen:
    """The model that all variants are made of, and what its matrices read of each kind of text.

    ``module`` has float32 weights. ``texts``: kind (``train``, and for language models ``self`` and
    ``random``) -> what makes its batches. They and what is read of them are made once, when the
    first variant asks. ``keep``: globs over names of parameters or modules. UserError for another
    dtype, or a glob that matches nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        wiring: Wiring,
        texts: Mapping[str, Callable[[], list[Any]]],
        keep: Collection[str] = (),
    ) -> None:
        for name, parameter in module.named_parameters():
            if parameter.dtype != torch.float32:
                raise UserError(f"model: {name} is {parameter.dtype}: give model.float()")
            if not parameter.isfinite().all():
                raise UserError(f"model: {name} holds NaN or infinity")
        try:
            kept = kept_parameters(module, keep)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.weights = {name: p.detach() for name, p in module.named_parameters()}
        self.kept = {name for name, p in module.named_parameters() if p in kept}
        self.module, self.wiring, self.texts = with_weights(module, self.weights), wiring, texts
        self._batches: dict[str, list[Any]] = {}
        self._inputs: dict[str, LayerInputs] = {}

    @staticmethod
    def of_spec(
        spec: ModelSpec, weights: Mapping[str, Tensor], texts: Mapping[str, Callable[[], list[Any]]]
    ) -> Frozen:
        """A language model by its spec; ``weights``: name -> float32 tensor of all of it."""
        return Frozen(with_weights(empty_model(spec), weights), wiring_of(spec), texts)

    @staticmethod
    def of_module(module: nn.Module, batches: list[Any], keep: Collection[str] = ()) -> Frozen:
        """Any model; ``batches``: what it is called with (``qat.model.wiring.arguments``)."""
        evaluating = with_weights(module, {n: p.detach() for n, p in module.named_parameters()})
        with torch.inference_mode():
            wiring = wiring_in(evaluating, batches[0])
        if not wiring.matrices:
            raise UserError("model: none of its matrices goes through nn.Linear or F.linear")
        return Frozen(evaluating, wiring, {"train": lambda: batches}, keep)

    @property
    def probe(self) -> Any:
        """A little input: of a language model a few tokens, of others the first batch."""
        if self.wiring.head is not None:
            return torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        return self.batches("train")[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @property
    def matrices(self) -> list[str]:
        """Names of what is quantized beside the embeddings and a language model's head."""
        return [name for name in self.wiring.matrices if name not in self.kept]

    @property
    def ends(self) -> list[str]:
        """Embeddings and a language model's head, but for those that are kept."""
        return [name for name in self.wiring.ends if name not in self.kept]

    def copy(self) -> nn.Module:
        return with_weights(self.module, self.weights)

    def inner_linears(self, module: nn.Module) -> dict[str, nn.Linear]:
        """Name -> layer of a copy, of all matrices that a library may quantize: layers that are
        called, unlike the last of ``nn.MultiheadAttention``, which is a holder of its weight."""
        matrices = set(self.matrices)
        return {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
            and not isinstance(layer, NonDynamicallyQuantizableLinear)
            and f"{name}.weight" in matrices
        }

    def batches(self, kind: str) -> list[Any]:
        if kind not in self._batches:
            self._batches[kind] = self.texts[kind]()
        return self._batches[kind]

    def read(self, kind: str, weights: Mapping[str, Tensor]) -> LayerInputs:
        """What every matrix reads of a kind of text where the model has these weights."""
        inputs = LayerInputs(self.module, weights, self.wiring, "fp32")
        return inputs.see_all(self.batches(kind))

    def inputs(self, kind: str) -> LayerInputs:
        if kind not in self._inputs:
            self._inputs[kind] = self.read(kind, self.weights)
        return self._inputs[kind]


def held_tensors(module: nn.Module) -> list[Tensor]:
    """All parameters, and the buffers that a file of the module holds."""
    saved = module.state_dict(keep_vars=True).values()
    buffers = {id(tensor) for tensor in module.buffers()}
    return [*module.parameters(), *(t for t in saved if id(t) in buffers)]


PROBE_TOKENS = 32
EMBEDDING = "float32"  # how tables call what libraries make of it
