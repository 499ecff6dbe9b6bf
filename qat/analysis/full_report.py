"""The metrics of ``eval=full`` for people: one table, and what they would rather look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from qat.analysis.full import ARTIFACT, FLOAT
from qat.analysis.intervals import MIN_FLIPS


def full_table(metrics: dict[str, Any]) -> Table:
    """``metrics``: what ``evaluate`` returned."""
    models = metrics["models"]
    text = metrics["text"]
    title = (
        f"{metrics['file']}: {text['tokens']:,} tokens, {text['text_bytes']:,} bytes, "
        f"{text['documents']:,} documents"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    if len(models) == 2:
        for title in ("change", "95 % interval", "flips", "real"):
            table.add_column(title, justify="right")

    def add(title: str, values: dict[str, str], *change: str) -> None:
        table.add_row(title, *(values[name] for name in models), *change)

    def compare(title: str, form: str, values: dict[str, float]) -> None:
        change = []
        if len(models) == 2:
            change = [f"{values[ARTIFACT] - values[FLOAT]:+{form}}"]
        add(title, {name: f"{value:{form}}" for name, value in values.items()}, *change)

    for key, form in (("val_bpb", ".5f"), ("val_loss", ".5f"), ("perplexity", ".3f"),
                      ("top1_accuracy", ".4f")):  # fmt: skip
        compare(key, form, {name: model[key] for name, model in models.items()})
    if all("reliability" in model for model in models.values()):
        table.add_section()
        _add_reliability(models, compare)
    if "damage" in metrics:
        table.add_section()
        for tier, found in metrics["damage"].items():
            for key, form in (("val_bpb", ".5f"), ("top1_accuracy", ".4f")):
                delta = found["delta_" + key.removeprefix("val_")]
                values = {name: f"{found[f'{key}_{name}']:{form}}" for name in models}
                add(
                    f"{key}, {tier} ({found['tokens']:,} tokens)", values,
                    f"{delta['estimate']:+{form}}", _interval(delta, form),
                    f"{found['flipped_predictions']:,}", "yes" if delta["is_real"] else "no",
                )  # fmt: skip
    if "layers" in metrics:
        table.add_section()
        for layer in metrics["layers"]:
            title = f"only {layer['tensor']}: output error {layer['output_error']:.4f}"
            add(
                title,
                {FLOAT: "", ARTIFACT: f"{layer['val_bpb']:.5f}"},
                f"{layer['delta_bpb']:+.5f}",
            )
    if "pairs" in metrics:
        table.add_section()
        _add_pairs(metrics["pairs"], add)
    if all("cost" in model for model in models.values()):
        table.add_section()
        for key, form in (("latency_ms", ".2f"), ("tokens_per_second", ",.0f")):
            spreads = {name: model["cost"][key] for name, model in models.items()}
            add(f"{key}, median (quartiles)", {
                name: f"{s['median']:{form}} ({s['lower_quartile']:{form}} to "
                      f"{s['upper_quartile']:{form}})" for name, s in spreads.items()
            })  # fmt: skip
        peaks = {name: model["cost"]["peak_memory_bytes"] for name, model in models.items()}
        add(
            "peak_memory_bytes", {n: "unknown" if p is None else f"{p:,}" for n, p in peaks.items()}
        )
    return table


def _add_reliability(models: dict[str, Any], compare: Any) -> None:
    found = {name: model["reliability"] for name, model in models.items()}
    compare("best temperature", ".4f", {name: c["temperature"] for name, c in found.items()})
    for key, form in (("ece_equal_width", ".5f"), ("ece_equal_mass", ".5f"),
                      ("nats_per_token", ".5f")):  # fmt: skip
        for label, title in (("none", "as it is"), ("tuned", "at its temperature")):
            values = {name: c["temperatures"][label][key] for name, c in found.items()}
            compare(f"{key}, {title}", form, values)
        if "floats" in found.get(ARTIFACT, {}).get("temperatures", {}):
            labels = {FLOAT: "tuned", ARTIFACT: "floats"}
            values = {name: c["temperatures"][labels[name]][key] for name, c in found.items()}
            compare(f"{key}, at the float model's temperature", form, values)


def _add_pairs(pairs: dict[str, Any], add: Any) -> None:
    for kind in next(iter(pairs["models"].values())):
        of_kind = {name: kinds[kind] for name, kinds in pairs["models"].items()}
        values = {
            name: f"{a['num_right'] / a['num_pairs']:.3f} ({a['low']:.3f} to {a['high']:.3f})"
            for name, a in of_kind.items()
        }
        num_pairs = next(iter(of_kind.values()))["num_pairs"]
        change = []
        if kind == "all" and "float_against_artifact" in pairs:
            test = pairs["float_against_artifact"]
            change = [
                f"p = {test['p_value']:.3g}", "",
                f"{test['only_first'] + test['only_second']}",
            ]  # fmt: skip
        add(f"minimal pairs, {kind} ({num_pairs:,})", values, *change)


def _interval(found: dict[str, Any], form: str) -> str:
    if found["low"] is None:
        return "too few documents"
    return f"{found['low']:+{form}} to {found['high']:+{form}}"


FLOAT_COLOUR, ARTIFACT_COLOUR = "#4477aa", "#cc6677"
COLOURS = {"float": FLOAT_COLOUR, "artifact": ARTIFACT_COLOUR}


def draw(metrics: dict[str, Any], folder: Path) -> list[str]:
    """Write the pictures that the metrics have numbers for; their names."""
    drawn = []
    if all("reliability" in model for model in metrics["models"].values()):
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
        found = model["reliability"]["temperatures"]
        for label, style in (("none", "o-"), ("tuned", "s:")):
            bins = found[label]["bins"]
            error = found[label]["ece_equal_width"]
            what = "" if label == "none" else f", T = {model['reliability']['temperature']:.3f}"
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
