"""What the pictures say of a prediction, taken from the record that `<slide>_prediction.json` keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

_RECIPE = ("backbone", "weights_digest", "patch_size", "stride", "level", "mpp", "tissue_threshold", "precision")
_DIGEST_LENGTH, _SHOWN = 64, 16  # a digest's beginning tells it from others


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
        model, recipe = record["model"], record["recipe"] or {}
        settings = ", ".join(f"{name} {value}" for name, value in model.items() if name != "name")
        chunked = f"in chunks of {record['chunk_size']}, their probabilities averaged"
        facts = [
            ("model", f"{model['name']} ({settings})"),
            ("checkpoint", record["checkpoint"]),
            ("fed", chunked if record["mode"] == "chunked" else "whole"),
            *((name, _short(str(recipe[name]))) for name in _RECIPE if recipe.get(name) is not None),
        ]
        delivered = (record["slide_record"] or {}).get("mpp_delivered")
        if delivered is not None:
            facts.append(("um/px of the patches", f"{delivered:.4g}"))
        seen = "The model was trained on this slide: its prediction proves nothing."
        return cls(
            f"{record['predicted_class']} ({record['confidence']:.1%})",
            record["probabilities"],
            facts,
            [seen] if record["seen_in_training"] else [],
        )


def _short(text: str) -> str:
    return text[:_SHOWN] if len(text) == _DIGEST_LENGTH else text
