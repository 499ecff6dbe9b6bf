"""THE grid: which values a weight may take, said once for training, post-training and export.

Levels (``weight = (code - zero) * scale`` in float32; an fp8 code is a float of that format):

    int, symmetric      codes in [-qmax, qmax], qmax = 2^(bits-1) - 1;  scale = clip / qmax
    int, full           codes in [-qmax-1, qmax], as in torchao;        scale = clip / (qmax + 1/2)
    int, asymmetric     the same codes, a zero point per group;         scale = (max - min) / levels
    ternary, binary     -1, 0, 1 (arXiv 2402.17764) and -1, 1;          scale = mean|w|
    fp8_e4m3, fp8_e5m2  the values of the format;                       scale = clip / largest

``clip`` is found per row, per group of ``group_size`` columns (the last may be shorter) or per
tensor:

    amax     max|w|               percentile  quantile of |w|
    sigma    sigma * std(w)       mse         the share of max|w| with the least square error
    fixed    scale = fixed_scale    learned     a parameter (LSQ, arXiv 1902.08153); mse without one
    given    scales come with the weights, from whoever chose the grid (the budget solver)

With ``column_scales`` there is a step per column beside that per row, and they multiply:
``weight = code * row scale * column scale``. A weight matters by what its column reads and what its
row feeds, so products are near the best scales where sensitivities differ (AWQ, arXiv 2306.00978,
scales columns likewise). Both are stored in ``scale_dtype``, rows first.

The scale is rounded to its storage dtype *before* codes are computed. Two grids store another scale
than they code with, on purpose: ``code_scale_dtype`` (the challenge's own int8 file codes with the
float32 scale and decodes with its float16 rounding) and ``refit`` (ternary: the stored scale is
divided by mean|code|, which undoes the shrinkage of mean|w|).

``scale_floor`` is a lower bound of the scale. In the challenge's file it is 1/127: a row is treated
as if max|w| >= 1, so one with max|w| = 0.2 keeps 51 levels of 255. SDClip: PR 1394.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LEVELS = ("int", "ternary", "binary", *FP8)
RANGES = ("symmetric", "full", "asymmetric")
SCALE_RULES = ("amax", "percentile", "sigma", "mse", "fixed", "absmean", "learned", "given")
MIN_BITS, MAX_BITS = 2, 8
# What a field means that a file does not name. It stays, whatever a grid's defaults become, so that
# no file ever changes its meaning; a new field joins with the value that says what was done before.
STORED_DEFAULTS: dict[str, Any] = {
    "levels": "int", "bits": None, "range": "symmetric", "group_size": None, "per_tensor": False,
    "scale_rule": "amax", "percentile": 0.9999984, "sigma": 12.85, "fixed_scale": None,
    "scale_floor": 0.0, "scale_dtype": "fp16", "code_scale_dtype": None, "refit": False,
    "column_scales": False,
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """One grid; every field is described in the module's text. ValueError for what cannot be."""

    levels: str = "int"
    bits: int | None = None  # of int levels
    range: str = "symmetric"
    group_size: int | None = None  # None: one scale per row
    per_tensor: bool = False
    scale_rule: str = "amax"
    percentile: float = 0.9999984  # a fraction in (0, 1]
    sigma: float = 12.85
    fixed_scale: float | None = None
    scale_floor: float = 0.0
    scale_dtype: str = "fp16"
    code_scale_dtype: str | None = None
    refit: bool = False
    column_scales: bool = False

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, remedy: str) -> None:
            if not condition:
                raise ValueError(f"{field} = {getattr(self, field)}: {remedy}")

        def one_of(field: str, options: tuple[str, ...]) -> None:
            require(getattr(self, field) in options, field, f"choose from {', '.join(options)}")

        one_of("levels", LEVELS)
        one_of("range", RANGES)
        one_of("scale_rule", SCALE_RULES)
        one_of("scale_dtype", tuple(DTYPES))
        if self.code_scale_dtype is not None:
            one_of("code_scale_dtype", tuple(DTYPES))
        is_int = self.levels == "int"
        given = self.bits is not None and MIN_BITS <= self.bits <= MAX_BITS
        require(
            given if is_int else self.bits is None,
            "bits",
            f"give {MIN_BITS} to {MAX_BITS}" if is_int else f"{self.levels} has its own levels",
        )
        require(is_int or self.range == "symmetric", "range", f"{self.levels} levels are symmetric")
        require(
            self.range != "asymmetric" or self.scale_rule == "amax",
            "scale_rule",
            "range=asymmetric takes scale_rule=amax",
        )
        require(
            self.group_size is None or self.group_size >= 1,
            "group_size",
            "give 1 or more, or null for per row",
        )
        require(not self.per_tensor or self.group_size is None, "per_tensor", "drop group_size")
        require(0.0 < self.percentile <= 1.0, "percentile", "give a fraction in (0, 1]")
        require(0.0 < self.sigma < math.inf, "sigma", "give more than 0")
        require(
            (self.scale_rule == "fixed") == (self.fixed_scale is not None),
            "fixed_scale",
            "goes with scale_rule=fixed",
        )
        require(
            self.fixed_scale is None or 0.0 < self.fixed_scale < math.inf,
            "fixed_scale",
            "give more than 0",
        )
        require(0.0 <= self.scale_floor < math.inf, "scale_floor", "give 0 or more")
        require(
            self.scale_rule != "learned" or self.levels in ("int", "ternary"),
            "scale_rule",
            f"{self.levels} scales cannot be learned",
        )
        require(
            self.scale_rule != "learned" or self.code_scale_dtype is None,
            "code_scale_dtype",
            "a learned scale codes and decodes; leave it null",
        )
        require(not (self.refit and self.scale_rule == "learned"), "refit", "not of learned scales")
        require(not self.refit or self.levels == "ternary", "refit", "is for ternary levels")
        has_scales = self.scale_rule in ("given", "learned")
        plain = is_int and self.range == "symmetric" and has_scales
        one_group = self.group_size is None and not self.per_tensor
        require(
            not self.column_scales or (plain and one_group and self.code_scale_dtype is None),
            "column_scales",
            "goes with symmetric int levels and given or learned scales, one per row",
        )

    @staticmethod
    def from_json(data: dict) -> Grid:
        """A grid from untrusted data: ValueError or TypeError also for a value of another type,
        which Python would let pass (6.0 bits, a scale of True)."""
        if not isinstance(data, dict):
            raise TypeError("a grid is not an object")
        data = STORED_DEFAULTS | data
        types = get_type_hints(Grid)
        for name, value in data.items():
            allowed = get_args(types.get(name)) or (types.get(name),)
            if type(value) not in allowed and not (type(value) is int and float in allowed):
                raise ValueError(f"{name[:40]!r} of a grid is {str(value)[:40]!r}")
        return Grid(**data)

    @property
    def code_limits(self) -> tuple[float, float]:
        """Lowest and highest code, as numbers (fp8: of the format)."""
        if self.levels in FP8:
            largest = torch.finfo(FP8[self.levels]).max
            return -largest, largest
        if self.bits is None:
            return -1, 1
        half = 2 ** (self.bits - 1)
        return (1 - half if self.range == "symmetric" else -half), half - 1

    @property
    def code_bits(self) -> float:
        """Bits of one code when packed as tightly as its number of levels allows."""
        levels = {"ternary": 3, "binary": 2, "fp8_e4m3": 256, "fp8_e5m2": 256}
        return float(self.bits) if self.bits is not None else math.log2(levels[self.levels])

    @property
    def label(self) -> str:
        """Short name that says every field that differs from a plain per-row grid."""
        parts = [f"int{self.bits}" if self.levels == "int" else self.levels]
        parts += [] if self.range == "symmetric" else [self.range]
        parts += [f"g{self.group_size}"] if self.group_size is not None else []
        parts += ["tensor"] if self.per_tensor else []
        rules = {
            "percentile": f"p{self.percentile:g}",
            "sigma": f"sigma{self.sigma:g}",
            "fixed": f"fixed{self.fixed_scale}",
            "mse": "mse",
            "learned": "learned",
            "given": "given",
        }
        parts += [rules[self.scale_rule]] if self.scale_rule in rules else []
        parts += [f"floor{self.scale_floor:g}"] if self.scale_floor else []
        parts += [self.scale_dtype] if self.scale_dtype != "fp16" else []
        parts += [f"code{self.code_scale_dtype}"] if self.code_scale_dtype else []
        parts += ["refit"] if self.refit else []
        parts += ["columns"] if self.column_scales else []
        return "_".join(parts)

    def as_json(self) -> dict[str, object]:
        """The fields that are not those of ``STORED_DEFAULTS``: bytes of every header."""
        return {name: v for name, v in vars(self).items() if v != STORED_DEFAULTS[name]}

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(rows, groups) of a tensor of this shape; (rows + columns, 1) with ``column_scales``."""
        if self.per_tensor or len(shape) < 2:
            rows, columns = 1, math.prod(shape)
        else:
            rows, columns = shape[0], math.prod(shape[1:])
        if self.column_scales:
            return rows + columns, 1
        return rows, 1 if self.group_size is None else -(-columns // self.group_size)
