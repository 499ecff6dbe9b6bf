"""What people would rather look at: reliability, damage by tier, damage by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qat.evaluation.bootstrap import MIN_FLIPS

FLOAT_COLOUR, ARTIFACT_COLOUR = "#4477aa", "#cc6677"
COLOURS = {"float": FLOAT_COLOUR, "artifact": ARTIFACT_COLOUR}


def draw(metrics: dict[str, Any], folder: Path) -> list[str]:
    """Write the pictures that the metrics have numbers for; their names."""
    drawn = []
    if all("calibration" in model for model in metrics["models"].values()):
        _reliability(metrics["models"], folder / "reliability.png")
        drawn.append("reliability.png")
    if "damage" in metrics:
        _tiers(metrics["damage"], folder / "tiers.png")
        drawn.append("tiers.png")
    if metrics.get("layers"):
        _layers(metrics["layers"], folder / "layers.png")
        drawn.append("layers.png")
    return drawn


def new_figure(width: float, height: float, **grid: Any):
    """(figure, axes) of so many inches; several axes by ``grid``, as ``Figure.subplots`` has it."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots(**grid)


def _reliability(models: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(5.5, 5.5)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, label="calibrated")
    for name, model in models.items():
        found = model["calibration"]["temperatures"]
        for label, style in (("none", "o-"), ("fitted", "s:")):
            bins = found[label]["reliability"]
            error = found[label]["ece_equal_width"]
            what = "" if label == "none" else f", T = {model['calibration']['temperature']:.3f}"
            axes.plot(
                [b["mean_confidence"] for b in bins], [b["accuracy"] for b in bins], style,
                color=COLOURS[name], markersize=4, linewidth=1,
                label=f"{name}{what}: ECE {error:.4f}",
            )  # fmt: skip
    axes.set_xlabel("confidence: probability of the likeliest token")
    axes.set_ylabel("accuracy: how often it was right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left")
    figure.savefig(path)


def _tiers(damage: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(6.5, 4)
    for at, found in enumerate(damage.values()):
        delta = found["delta_bpb"]
        if delta["low"] is not None:
            axes.plot([at, at], [delta["low"], delta["high"]], color=ARTIFACT_COLOUR, linewidth=2)
        mark = "o" if delta["is_real"] else "x"
        axes.plot(at, delta["estimate"], mark, color=ARTIFACT_COLOUR)
        axes.annotate(
            f"{found['flipped_predictions']:,} flips", (at, delta["estimate"]),
            textcoords="offset points", xytext=(8, 0), va="center", fontsize=8,
        )  # fmt: skip
    axes.axhline(0.0, color="grey", linewidth=1)
    axes.set_xlim(-0.5, len(damage))
    axes.set_xticks(range(len(damage)), [f"{t}\n{d['tokens']:,}" for t, d in damage.items()])
    axes.set_xlabel("tokens by how often training saw them")
    axes.set_ylabel("artifact - float, bits per byte")
    axes.set_title(
        f"95 % intervals over documents; x: not called real (interval or < {MIN_FLIPS} flips)",
        fontsize=9,
    )
    figure.savefig(path)


def _layers(layers: list[dict[str, Any]], path: Path) -> None:
    figure, axes = new_figure(7, 1 + 0.22 * len(layers))
    names = [layer["tensor"] for layer in layers]
    axes.barh(names, [layer["delta_bpb"] for layer in layers], color=ARTIFACT_COLOUR)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    for at, layer in enumerate(layers):
        axes.annotate(
            f" {layer['output_error']:.3f}", (max(layer["delta_bpb"], 0.0), at),
            va="center", fontsize=7,
        )  # fmt: skip
    axes.margins(x=0.08)  # room for the numbers
    axes.set_xlabel("rise of bits per byte if only this tensor is quantized (number: output error)")
    figure.savefig(path)
