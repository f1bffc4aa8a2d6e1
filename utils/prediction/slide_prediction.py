"""The prediction of trained models for one slide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.bags.store import Bag, StoredBag
from utils.prediction.evidence import Evidence
from utils.prediction.forward_pass import SlideFeed
from utils.tasks.task import Task

SEEN = "%s: this model was trained on this %s; its prediction is not independent evidence"


@dataclass(frozen=True)
class PartOfCase:
    """A slide in the bag of all `slides` of a patient: its patches are those of the bag from number `first` on.

    Attributes
        attention: `(M,)`, the mean over the heads, of all patches of the bag, or None; evidence: that of the bag.
    """

    case_id: str
    slides: tuple[str, ...]
    first: int
    attention: NDArray[np.float32] | None
    evidence: Evidence | None


@dataclass(frozen=True)
class SlidePrediction:
    """The prediction for a slide.

    Attributes
        probabilities: `(C,)`; calibrated: `(C,)`, None if a model is not calibrated.
        attention: `(H, N)`, each head summing to 1 over the patches, or None; bag: the features and their coordinates.
        seen_as: "slide" or "case" if a model was trained on it, "" if none was, None if a checkpoint does not say.
        member_probabilities: `(M, C)` of each of several models, or None.
        evidence: what the patches argue for and against each class, if it was asked for and the models give it.
        decided: the decision by what was fitted, in words (see `Task.decision_text`), or None.
        of_case: where the slide is in the bag of its patient, if it was answered together with others; attention and
            evidence are then those of its own patches, and the answer is that for the patient.
    """

    slide: str
    task: Task
    probabilities: NDArray[np.float64]
    calibrated: NDArray[np.float64] | None
    attention: NDArray[np.float32] | None
    bag: Bag | StoredBag
    feed: SlideFeed
    seen_as: str | None
    member_probabilities: NDArray[np.float64] | None = None
    evidence: Evidence | None = None
    decided: str | None = None
    of_case: PartOfCase | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.task.outputs

    @property
    def predicted_class(self) -> str:
        return str(self.task.prediction_text(self.probabilities[None])[0])

    @property
    def confidence(self) -> float:
        """Return the predicted class's probability."""
        return float(self.probabilities[self.task.decide(self.probabilities)])

    @property
    def seen_in_training(self) -> bool | None:
        return None if self.seen_as is None else bool(self.seen_as)

    @property
    def num_instances(self) -> int:
        return len(self.bag.features)

    @property
    def coords(self) -> NDArray[np.int64] | None:
        """Return the patches' top-left corners, `(N, 2)` in level-0 px."""
        return self.bag.coords

    @property
    def patch_attention(self) -> NDArray[np.float32] | None:
        """Return the mean over heads, `(N,)`, which sums to 1."""
        return None if self.attention is None else self.attention.mean(axis=0)

    @property
    def evidence_strength(self) -> NDArray[np.float32] | None:
        """Return the size of each patch's evidence on the predicted output, `(1, N)`, which sums to 1; None without."""
        if self.evidence is None:
            return None
        signal = self.task.signal_about(int(self.task.decide(self.probabilities)))
        sizes = np.abs(self.evidence.contributions[signal])
        total = sizes.sum(dtype=np.float64)
        return (sizes / total if total else np.full_like(sizes, 1 / len(sizes))).astype(np.float32)[None]

    def as_dict(self) -> dict[str, Any]:
        """Return the slide's entries in `<slide>_prediction.json`; of several models also each one's values, and their
        (sample) standard deviation.
        """
        return {
            "slide": self.slide,
            **self.task.answer(self.probabilities, self.calibrated, self.member_probabilities),
            **({self.task.decided_key: self.decided} if self.task.decided_key else {}),
            "num_instances": self.num_instances,
            **self.feed.as_dict(),
            **self._case_entry(),
            "seen_in_training": self.seen_in_training,
            "seen_as": self.seen_as,
        }

    def _case_entry(self) -> dict[str, Any]:
        """Return the entry on the patient's slides, with the share of the attention that is on this one."""
        case, own = self.of_case, self.patch_attention
        if case is None:
            return {}
        share = None if own is None else float(own.sum(dtype=np.float64))
        return {"case": {"case_id": case.case_id, "slides": list(case.slides), "share": share}}

    def evidence_entry(self) -> dict[str, Any] | None:
        """Return the entry on evidence in `<slide>_prediction.json`: each class's log-odds, or the other signals of the
        task, those of the reference, and the sums of what argues for it and against it. None without evidence.
        """
        if self.evidence is None:
            return None
        contributions = self.evidence.contributions.astype(np.float64)
        others, unit = {}, "slide" if self.feed.unit == "slide" else "patient"
        if self.of_case is not None and self.of_case.evidence is not None:
            all_slides = self.of_case.evidence.contributions.sum(axis=1, dtype=np.float64)
            others = {"other_slides": self._by_class(all_slides - contributions.sum(axis=1))}
        return {
            self.task.quantity_key: self._by_class(self.evidence.signals),
            "reference": self._by_class(self.evidence.reference),
            "for": self._by_class(contributions.clip(min=0).sum(axis=1)),
            "against": self._by_class(contributions.clip(max=0).sum(axis=1)),
            **others,
            "begins_at": f"mean of the {unit}'s patches" if self.evidence.is_own_mean else f"mean training {unit}",
        }

    def _by_class(self, values: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(self.task.signal_names, values.tolist(), strict=True))


def parts_of(
    whole: SlidePrediction, bags: Mapping[Path, Bag | StoredBag], seen: Sequence[str | None], case_id: str | None
) -> list[SlidePrediction]:
    """Return what the prediction of several slides' bags as one, in this order, says of each of them.

    `seen` says of each slide what a model was trained on (see `SlidePrediction.seen_as`); with a slide that was trained
    on, its patient's others count as seen, too.
    """
    if len(bags) == 1:
        (path,), (bag,) = bags.keys(), bags.values()
        return [replace(whole, slide=path.stem, bag=bag, seen_as=seen[0])]
    slides, first, parts = tuple(path.stem for path in bags), 0, []
    for (path, bag), own in zip(bags.items(), seen, strict=True):
        rows = slice(first, first + len(bag.features))
        evidence = whole.evidence and replace(whole.evidence, contributions=whole.evidence.contributions[:, rows])
        parts.append(
            replace(
                whole,
                slide=path.stem,
                bag=bag,
                attention=None if whole.attention is None else whole.attention[:, rows],
                evidence=evidence,
                seen_as="case" if own == "" and any(seen) else own,
                of_case=PartOfCase(case_id or path.stem, slides, first, whole.patch_attention, whole.evidence),
            )
        )
        first = rows.stop
    return parts
