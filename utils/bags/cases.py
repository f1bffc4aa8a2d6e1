"""Bags of cases: all slides of a patient as one bag."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.bags.labels import LabelRow
from utils.bags.store import BagInfo, StoredFeatures
from utils.core.errors import LabelsError, first_few, plural
from utils.tasks.targets import Target


class CaseFeatures:
    """The features of cases: those of their slides, from a `source` of slides, one below the other.

    `slides_of[case]` are the numbers of its slides. A case of one slide costs no copy.
    """

    def __init__(self, source: Callable[[int], Tensor], slides_of: Sequence[Sequence[int]]) -> None:
        self.source, self.slides_of = source, slides_of

    def __call__(self, case: int) -> Tensor:
        """Return `(N, D)`: float16, or float32 if a slide is."""
        features = [self.source(slide) for slide in self.slides_of[case]]
        return features[0] if len(features) == 1 else torch.cat(features)


class JoinedFeatures(StoredFeatures):
    """The features `(N, D)` of several slides, one below the other, read on demand; each on its own if in memory."""

    def __init__(self, parts: Sequence[StoredFeatures | Tensor]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.parts[0].shape[1]

    def whole(self) -> Tensor:
        return torch.cat([part if isinstance(part, Tensor) else part.whole() for part in self.parts])

    def blocks(self, rows_each: int) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.split(rows_each) if isinstance(part, Tensor) else part.blocks(rows_each)


def case_rows(rows: Sequence[LabelRow], path: Path) -> tuple[list[LabelRow], list[list[int]]]:
    """Return a row for each patient, in the order of their first slides, and the numbers of each one's slides.

    A patient's row has the patient's name as `wsi_id`; columns and files stay with the slides. Raises LabelsError,
    which names the table, for patients whose slides differ in their target.
    """
    slides_of: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        slides_of.setdefault(row.case_id, []).append(number)
    targets = {case: _one_target([rows[slide].label for slide in slides]) for case, slides in slides_of.items()}
    mixed = [case for case, target in targets.items() if target is None]
    if mixed:
        raise LabelsError(
            f"{path}: --unit case: {plural(len(mixed), 'patient')} with slides of different labels: "
            f"{first_few(mixed)}; a bag of all slides has one label, so mend the table, or give --unit slide"
        )
    cases = [
        replace(rows[slides_of[case][0]], wsi_id=case, label=target, columns={})
        for case, target in targets.items()
        if target is not None
    ]
    return cases, list(slides_of.values())


def _one_target(targets: Sequence[Target]) -> Target | None:
    """Return the target of all slides, None if they differ; of several numbers each where it is known (no NaN)."""
    columns = [target if isinstance(target, tuple) else (target,) for target in targets]
    known = [[value for value in values if not math.isnan(value)] for values in zip(*columns, strict=True)]
    if any(len(set(values)) > 1 for values in known):
        return None
    if not isinstance(targets[0], tuple):
        return targets[0]
    return tuple(values[0] if values else math.nan for values in known)


def case_info(info: Sequence[BagInfo], slides_of: Sequence[Sequence[int]]) -> list[BagInfo]:
    """Return the size of each case's bag."""
    return [_merged_info([info[slide] for slide in slides]) for slides in slides_of]


def _merged_info(info: Sequence[BagInfo]) -> BagInfo:
    dtype = np.result_type(*(each.dtype for each in info))
    return BagInfo(sum(each.num_instances for each in info), info[0].dim, dtype, passport=None)
