"""THE grid: which values a weight may take, said once for training, post-training and export.

``weight = level * scale`` in float32. Levels are a number format, a file of qat/quantize/levels;
``bits`` and ``range`` are of int levels (asymmetric: a zero point per group, and a scale of
(max - min) / (highest - lowest)). A scale is found per row, per group of ``group_size`` columns
(the last may be shorter) or per tensor. These rules find a clip, and the scale is the clip by half
of what lies between the lowest and the highest level:

    amax     max|w|               percentile  quantile of |w|
    sigma    sigma * std(w)       mse         the share of max|w| with the least square error

and these the scale itself:

    absmean  mean|w|              fixed       ``fixed_scale``
    learned  a parameter (LSQ, arXiv 1902.08153); without one as mse
    power    max|w| rounded down to a power of two, over that of the highest level (OCP MX v1.0)
    given    comes with the weights, from whoever chose the grid (the budget solver)

With ``column_scales`` there is a scale per column beside that per row, and they multiply:
``weight = code * row scale * column scale``. A weight matters by what its column reads and what its
row feeds, so products are near the best scales where sensitivities differ (AWQ, arXiv 2306.00978,
scales columns likewise). Both are stored in ``scale_dtype``, rows first.

The scale is rounded to its storage dtype *before* codes are computed. e8m0 is a byte of powers of
two, and rounds up, so that nothing is clipped. e4m3 are bytes in units of one float32 scale per
tensor, max|w| over the highest level and 448 (NVFP4).

With ``rotate`` the grid is one of rotated weights: every row is multiplied, in blocks of so many
columns, by the orthonormal Hadamard matrix before scales and codes are found, and again after they
are decoded, which undoes it. A large weight is spread over its block, so a group's largest is
nearer to the others (QuaRot, arXiv 2404.00456, and QuIP#, 2402.04396; of weights alone, and inside
one matrix, so that the model stays what it is). What is left at a row's end has the largest blocks
that fit, 288 columns by 256 one of 256 and one of 32.

q4_0 and q5_0 give the weight of largest magnitude the lowest level: their scales have its sign.

Some grids store another scale than they code with, on purpose: gguf blocks (levels/gguf.py),
``code_scale_dtype`` (the challenge's own int8 file codes with the float32 scale and decodes with
its float16 rounding) and ``refit`` (ternary: the stored scale is divided by mean|code|, which
undoes the shrinkage of mean|w|).

Scales by amax, percentile and power, and those that are fixed or handed in, give the same bits on a
CPU and on CUDA. sigma, mse and absmean depend on the order of sums, and so does a learned scale
when it is first found: there a device may find another last digit of a scale, and so other codes.

``scale_floor`` is a lower bound of the scale. In the challenge's file it is 1/127: a row is treated
as if max|w| >= 1, so one with max|w| = 0.2 keeps 51 levels of 255. SDClip: PR 1394.
"""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from functools import cached_property
from typing import Any, get_args, get_type_hints

from qat.quantize.levels import SCALE_RULES, Levels, all_levels

FLOAT_DTYPES = ("fp32", "bf16", "fp16")
SCALE_DTYPES = (*FLOAT_DTYPES, "e8m0", "e4m3")
ROTATED_COLUMNS = tuple(2**k for k in range(1, 11))
# What a field means that a file does not name. It stays, whatever a grid's defaults become, so that
# no file ever changes its meaning; a new field joins with the value that says what was done before.
STORED_DEFAULTS: dict[str, Any] = {
    "levels": "int", "bits": None, "range": "symmetric", "group_size": None, "per_tensor": False,
    "scale_rule": "amax", "percentile": 0.9999984, "sigma": 12.85, "fixed_scale": None,
    "scale_floor": 0.0, "scale_dtype": "fp16", "code_scale_dtype": None, "refit": False,
    "column_scales": False, "rotate": None,
}  # fmt: skip


@dataclass(unsafe_hash=True)
class Grid:
    """One grid, and the settings ``grid.*``. ValueError for what cannot be, naming the field.

    As good as frozen: OmegaConf takes ``frozen=True`` for settings that nobody may set.
    """

    levels: str = "int"  # a name in qat/quantize/levels
    bits: int | None = None  # of int levels, 2 to 8
    range: str = "symmetric"  # symmetric | full | asymmetric, of int levels
    group_size: int | None = None  # columns per scale; null = one scale per row
    per_tensor: bool = False
    scale_rule: str = "amax"  # amax | percentile | sigma | mse | power | fixed | absmean | learned
    percentile: float = 0.9999984  # a fraction in (0, 1], used by scale_rule=percentile
    sigma: float = 12.85  # clip in standard deviations, used by scale_rule=sigma
    fixed_scale: float | None = None  # used by scale_rule=fixed
    scale_floor: float = 0.0
    scale_dtype: str = "fp16"  # fp32 | bf16 | fp16 | e8m0 | e4m3, as stored
    code_scale_dtype: str | None = None  # null = scale_dtype
    refit: bool = False  # ternary: undo the shrinkage of mean|w|
    column_scales: bool = False  # learned scales per row and per column, multiplied
    rotate: int | None = None  # columns of a Hadamard block; the setting is plan.rotate

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, remedy: str) -> None:
            if not condition:
                raise ValueError(f"{field} = {getattr(self, field)}: {remedy}")

        def one_of(field: str, options: tuple[str, ...]) -> None:
            require(getattr(self, field) in options, field, f"choose from {', '.join(options)}")

        one_of("levels", tuple(all_levels()))
        one_of("scale_rule", SCALE_RULES)
        one_of("scale_dtype", SCALE_DTYPES)
        if self.code_scale_dtype is not None:
            one_of("code_scale_dtype", FLOAT_DTYPES)
        table, is_learned = self.table, self.scale_rule == "learned"
        taken = f"{self.levels} levels take {', '.join(table.scale_rules)}"
        require(self.scale_rule in table.scale_rules, "scale_rule", taken)
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
            not is_learned or self.code_scale_dtype is None,
            "code_scale_dtype",
            "a learned scale codes and decodes; leave it null",
        )
        is_byte = self.scale_dtype not in FLOAT_DTYPES
        for name in ("code_scale_dtype", "refit", "scale_floor", "column_scales"):
            fits = not (is_byte or table.multiplies) or not getattr(self, name)
            require(fits, name, f"not of {self.levels} levels with {self.scale_dtype} scales")
        require(not (is_byte and table.multiplies), "scale_dtype", "blocks of gguf take fp16")
        require(not is_learned or not is_byte, "scale_dtype", "learned scales take fp16")
        require(
            self.scale_dtype != "e4m3" or self.scale_rule in ("amax", "given"),
            "scale_rule",
            "scale_dtype=e4m3 takes amax",
        )
        require(not (is_byte and self.range == "asymmetric"), "scale_dtype", "zero points: fp16")
        require(not (self.refit and is_learned), "refit", "not of learned scales")
        require(not self.refit or "refit" in table.takes, "refit", "is for ternary levels")
        plain = self.range == "symmetric" and self.scale_rule in ("given", "learned")
        one_group = self.group_size is None and not self.per_tensor
        multiplies = "column_scales" in table.takes and plain and one_group
        require(
            not self.column_scales or (multiplies and self.code_scale_dtype is None),
            "column_scales",
            "goes with symmetric int levels and given or learned scales, one per row",
        )
        require(
            self.rotate is None or self.rotate in ROTATED_COLUMNS,
            "rotate",
            f"give a power of two from 2 to {ROTATED_COLUMNS[-1]}, or null",
        )
        is_rotatable = not (table.multiplies or self.column_scales)
        what = f"{self.levels} levels" if table.multiplies else "column_scales"
        require(self.rotate is None or is_rotatable, "rotate", f"not of {what}; give null")

    def __setattr__(self, name: str, value: object) -> None:
        if "table" in vars(self):  # it was checked, and hashed
            raise FrozenInstanceError(f"cannot assign to {name}; make another grid")
        super().__setattr__(name, value)

    @cached_property
    def table(self) -> Levels:
        """The levels themselves."""
        return all_levels()[self.levels].of(self.bits, self.range)

    @cached_property
    def unrotated(self) -> Grid:
        """The grid that rotated weights are on; this one, if it does not rotate."""
        return self if self.rotate is None else replace(self, rotate=None)

    @property
    def has_tensor_scale(self) -> bool:
        """A float32 scale of the whole tensor, in units of which its scales are stored."""
        return self.scale_dtype == "e4m3"

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
    def label(self) -> str:
        """Short name that says every field that differs from a plain per-row grid."""
        parts = [self.table.label]
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
            "power": "power",
        }
        parts += [rules[self.scale_rule]] if self.scale_rule in rules else []
        parts += [f"floor{self.scale_floor:g}"] if self.scale_floor else []
        parts += [self.scale_dtype] if self.scale_dtype != "fp16" else []
        parts += [f"code{self.code_scale_dtype}"] if self.code_scale_dtype else []
        parts += ["refit"] if self.refit else []
        parts += ["columns"] if self.column_scales else []
        parts += [f"h{self.rotate}"] if self.rotate is not None else []
        return "_".join(parts)

    def as_json(self) -> dict[str, object]:
        """The fields that are not those of ``STORED_DEFAULTS``: bytes of every header."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v for name, v in said.items() if v != STORED_DEFAULTS[name]}

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(rows, groups) of a tensor of this shape; (rows + columns, 1) with ``column_scales``."""
        if self.per_tensor or len(shape) < 2:
            rows, columns = 1, math.prod(shape)
        else:
            rows, columns = shape[0], math.prod(shape[1:])
        if self.column_scales:
            return rows + columns, 1
        return rows, 1 if self.group_size is None else -(-columns // self.group_size)
