"""What the pictures say of a prediction, taken from the record that `<slide>_prediction.json` keeps."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from utils.core.cohorts import SYNTHETIC

_RECIPE = (
    "backbone", "weights_digest", "patch_size", "stride", "level", "mpp", "tissue_threshold", "edge", "precision",
)  # fmt: skip
_DIGEST_LENGTH, _SHOWN = 64, 16  # a digest's beginning tells it from others


def title_of(record: Mapping[str, Any]) -> str:
    """A prediction in a line, above every picture of it."""
    return f"{record['slide']}: {_answer(record)}" + (", seen in training" if record["seen_in_training"] else "")


def _answer(record: Mapping[str, Any]) -> str:
    predicted, members = record["predicted_class"], record.get("member_probabilities") or []
    agreeing = sum(max(one, key=one.__getitem__) == predicted for one in members)
    return f"{predicted} ({record['confidence']:.1%}" + (f", {agreeing} of {len(members)} models)" if members else ")")


@dataclass(frozen=True)
class Caption:
    """A prediction's answer in a line, `probabilities` by class, `facts` (pairs of a name and a text) on how it was
    made, `notes` that no reader must miss.
    """

    answer: str = ""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Of a prediction's record; `model`, `checkpoint`, `recipe` and `slide_record` say how it was made."""
        return cls(_answer(record), record["probabilities"], _facts(record), _notes(record))


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe, several = record["recipe"] or {}, isinstance(record["checkpoint"], list)
    models = record["model"] if several else [record["model"]]
    checkpoints = record["checkpoint"] if several else [record["checkpoint"]]
    chunked = f"in chunks of {record['chunk_size']}, their probabilities averaged"
    facts = [
        ("models, averaged" if several else "model", _counted(map(_model_text, models))),
        ("checkpoints" if several else "checkpoint", _paths_text(checkpoints)),
        *([("answered", f"out of fold, by the model of fold {record['fold']}")] if "fold" in record else []),
        ("fed", chunked if record["mode"] == "chunked" else "whole"),
    ]
    if record.get("member_probabilities"):
        predicted = record["predicted_class"]
        each = ", ".join(f"{one[predicted]:.1%}" for one in record["member_probabilities"])
        facts.append((f"{predicted} by each model", f"{each}; standard deviation {record['spread'][predicted]:.1%}"))
    calibrated = record.get("calibrated_probabilities")
    if calibrated is not None:
        temperatures = record["temperature"] if several else [record["temperature"]]
        told = ", ".join(f"{one:.2f}" for one in temperatures)
        facts.append(("calibrated probability", f"{calibrated[record['predicted_class']]:.1%} (temperature {told})"))
    if record.get("faithfulness"):
        facts.append(("faithfulness", _faithfulness(record["faithfulness"])))
    facts += [(name, _short(str(recipe[name]))) for name in _RECIPE if recipe.get(name) is not None]
    delivered = (record["slide_record"] or {}).get("mpp_delivered")
    return facts if delivered is None else [*facts, ("µm/px of the patches", f"{delivered:.4g}")]


def _notes(record: Mapping[str, Any]) -> list[str]:
    notes = []
    if record["seen_in_training"]:
        what = "patient" if record.get("seen_as") == "case" else "slide"
        notes.append(f"The model was trained on this {what}: its prediction proves nothing.")
    if record.get("dataset") == SYNTHETIC:
        notes.append("The model was trained on synthetic slides, drawn by rule: what it says of tissue means nothing.")
    if record.get("faithfulness") and record["faithfulness"]["deletion"]["gap"] <= 0:
        notes.append(
            "Attention does not support this answer: without the most attended patches, "
            f"{record['predicted_class']} is no less probable than without random ones."
        )
    return notes


def _model_text(model: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in model.items() if name != "name")
    return f"{model['name']} ({settings})"


def _counted(texts: Iterable[str]) -> str:
    """Each of the texts once, with how often it comes."""
    return "; ".join(text if times == 1 else f"{times} x {text}" for text, times in Counter(texts).items())


def _paths_text(paths: Sequence[str]) -> str:
    """Files by their folders."""
    folders: dict[str, list[str]] = {}
    for path in map(Path, paths):
        folders.setdefault(str(path.parent), []).append(path.name)
    if len(paths) == 1:
        return paths[0]
    return "; ".join(f"{', '.join(names)} in {folder}" for folder, names in folders.items())


def _faithfulness(found: Mapping[str, Any]) -> str:
    told = [
        f"{name} {found[name]['gap']:+.3f} (beats {found[name]['random_orders_beaten']} of {found['random_orders']})"
        for name in ("deletion", "insertion")
    ]
    return f"mean probability against random orders: {', '.join(told)}"


def _short(text: str) -> str:
    return text[:_SHOWN] if len(text) == _DIGEST_LENGTH else text
