"""What the pictures say of a prediction, taken from the record that `<slide>_prediction.json` keeps."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
        recipe = record["recipe"] or {}
        several = isinstance(record["checkpoint"], list)
        models = record["model"] if several else [record["model"]]
        checkpoints = record["checkpoint"] if several else [record["checkpoint"]]
        chunked = f"in chunks of {record['chunk_size']}, their probabilities averaged"
        facts = [
            ("models, averaged" if several else "model", _in_words(map(_model_text, models))),
            ("checkpoints" if several else "checkpoint", _in_words(checkpoints)),
            ("fed", chunked if record["mode"] == "chunked" else "whole"),
            *((name, _short(str(recipe[name]))) for name in _RECIPE if recipe.get(name) is not None),
        ]
        delivered = (record["slide_record"] or {}).get("mpp_delivered")
        if delivered is not None:
            facts.append(("um/px of the patches", f"{delivered:.4g}"))
        calibrated = record.get("calibrated_probabilities")
        if calibrated is not None:
            temperatures = record["temperature"] if several else [record["temperature"]]
            told = ", ".join(f"{one:.2f}" for one in temperatures)
            facts.append(
                ("calibrated probability", f"{calibrated[record['predicted_class']]:.1%} (temperature {told})")
            )
        if "faithfulness" in record:
            facts.append(("faithfulness", _faithfulness(record["faithfulness"])))
        what = "patient" if record.get("seen_as") == "case" else "slide"
        seen = f"The model was trained on this {what}: its prediction proves nothing."
        return cls(
            f"{record['predicted_class']} ({record['confidence']:.1%})",
            record["probabilities"],
            facts,
            [seen] if record["seen_in_training"] else [],
        )


def _model_text(model: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in model.items() if name != "name")
    return f"{model['name']} ({settings})"


def _in_words(texts: Iterable[str]) -> str:
    """Each of the texts once, with how often it comes."""
    return "; ".join(text if times == 1 else f"{times} x {text}" for text, times in Counter(texts).items())


def _faithfulness(found: Mapping[str, Any]) -> str:
    told = [
        f"{name} {found[name]['gap']:+.3f} (beats {found[name]['random_orders_beaten']} of {found['random_orders']})"
        for name in ("deletion", "insertion")
    ]
    return f"mean probability against random orders: {', '.join(told)}"


def _short(text: str) -> str:
    return text[:_SHOWN] if len(text) == _DIGEST_LENGTH else text
