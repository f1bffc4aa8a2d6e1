"""What a measured faithfulness says, in words: the gaps of both maps, and which of them the answer bears out."""

from collections.abc import Mapping
from typing import Any

from utils.pictures.attention_map import ATTENTION, UNIFORM


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


def doubts(predicted_class: str, measured: Mapping[str, Any], weights: str) -> list[str]:
    """Return which maps the answer does not bear out, and which it does instead; `weights` is what the weights are.

    Equal weights are no map to be borne out: their order is that of the file.
    """
    name = weights.capitalize()
    maps = ({} if weights == UNIFORM else {name: measured}) | (
        {"Evidence": measured["evidence"]} if "evidence" in measured else {}
    )
    most = "the most attended patches" if weights == ATTENTION else f"the patches with the highest {weights}"
    firsts = {name: most, "Evidence": "the patches that argue most for it"}
    gaps = {kind: curves["deletion"]["gap"] for kind, curves in maps.items()}
    failing = [kind for kind, gap in gaps.items() if gap is not None and gap <= 0]
    notes = [
        f"{kind} does not support this answer: without {firsts[kind]}, {predicted_class} is no less probable than "
        "without random ones." for kind in failing
    ]  # fmt: skip
    if failing == [name] and gaps.get("Evidence") is not None:
        notes[0] += " The evidence does: look at that map."
    return notes
