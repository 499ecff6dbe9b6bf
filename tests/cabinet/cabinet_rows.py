"""Made-up rows of a post-training sweep, in the shape in which the sweep writes them."""

from __future__ import annotations

from typing import Any

from qat.cabinet.roofline import Ceilings

CEILINGS = Ceilings(30e9, {"float32": 1e11, "bfloat16": 4e11}, {"int8": "no kernel here"})


def make_row(
    variant: str, family: str, disk_bytes: int, gap_bpb: float = 0.0, **changed: Any
) -> dict[str, Any]:
    """A measured row; the fp32 it is compared with has 1.35 bits per byte."""
    val_bpb = 1.35 + gap_bpb
    tiers = {
        tier: {
            "delta_bpb": {
                "estimate": gap_bpb * times, "low": gap_bpb * times - 0.002,
                "high": gap_bpb * times + 0.002, "num_documents": 60,
                "is_real": gap_bpb > 0.002,
            },
            "flipped_predictions": int(50_000 * gap_bpb),
        }
        for tier, times in (("head", 0.8), ("mid", 1.0), ("tail", 1.5), ("all", 1.0))
    }  # fmt: skip
    row = {
        "variant": variant, "family": family, "status": "measured", "reason": None,
        "disk_bytes": disk_bytes, "memory_bytes": 2 * disk_bytes, "embedding": "int8",
        "val_bpb": val_bpb, "val_loss": 1.7 * val_bpb, "perplexity": 9.9, "gap_bpb": gap_bpb,
        "top1_accuracy": 0.4, "ece": 0.01 + gap_bpb / 10, "ece_at_temperature": 0.008,
        "temperature": 1.02, "tiers": tiers, "pairs_accuracy": 0.8, "pairs_low": 0.78,
        "pairs_high": 0.82, "latency_ms": 12.0, "tokens_per_second": 21_000.0,
        "latency_speedup": 1.5, "latency_speedup_low": 1.4,
        "throughput_speedup": 1.2, "throughput_speedup_low": 1.1,
        "peak_memory_bytes": None, "activation_bytes": 30_000_000, "flops": 1_500_000_000,
        "reliability": [
            {"mean_confidence": c, "accuracy": c * (1 - gap_bpb / 4), "count": 1000}
            for c in (0.1, 0.3, 0.5, 0.7, 0.9)
        ],
        "weight_traffic_bytes": disk_bytes,
    }  # fmt: skip
    return {**row, **changed}


def unavailable(variant: str, family: str, reason: str) -> dict[str, Any]:
    return {"variant": variant, "family": family, "status": "unavailable", "reason": reason}


def make_float(**changed: Any) -> dict[str, Any]:
    even = dict.fromkeys(("latency_speedup", "throughput_speedup"), 1.0)
    even |= dict.fromkeys(("latency_speedup_low", "throughput_speedup_low"), 0.97)
    head = {"tiers": None, "embedding": "fp32"} | even
    return make_row("fp32", "float", 10_600_000, **(head | changed))
