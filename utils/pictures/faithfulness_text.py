"""What a measured faithfulness says, in words: the gaps of both maps, and which of them the answer bears out more."""

from collections.abc import Mapping
from typing import Any

from utils.pictures.attention_map import UNIFORM


def gap_words(curve: str, measured: Mapping[str, Any], weights: str) -> list[str]:
    """Return the gaps of a curve, "deletion" or "insertion", one text for each map: "deletion gap by evidence +0.390".

    `measured` is a record's `faithfulness`, `weights` what the weights are. Maps without an order have no gap.
    """
    maps = {} if weights == UNIFORM else {weights: measured}
    maps |= {"evidence": measured["evidence"]} if measured.get("evidence") else {}
    return [
        f"{curve} gap by {name} {curves[curve]['gap']:+.3f}"
        for name, curves in maps.items()
        if curves[curve]["gap"] is not None
    ]


def verdict(measured: Mapping[str, Any], weights: str) -> str:
    """Return which map the answer bears out more, if both beat random orders, or why attention has no gap; else
    nothing.
    """
    reason = measured["deletion"].get("reason")
    if reason:
        return f"{reason.capitalize()}, so its weights have no order to test."
    better = measured.get("borne_out_more")
    if better is None or weights == UNIFORM:
        return ""
    name = weights if better == "attention" else better
    return (
        f"Both maps beat random orders; the answer bears out the {name} more ("
        f"{', '.join(gap_words('deletion', measured, weights))})."
    )
