"""Read the split files of a training run, of CLAM and of MAD-MIL, and make a cohort's folds from them.

In files slides are ids; in folds they are indices.
"""

import csv
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.bags.labels import id_hint, missed_id, near_ids
from utils.bags.spelling import without_ending
from utils.core.errors import SplitError, first_few, plural
from utils.core.files import read_json, read_record
from utils.core.runtime import log
from utils.learning.splits import InnerFold, OuterFold

SUBSETS = ("train", "val", "test")
# Names of subsets in label tables, and of the columns that hold them.
_SUBSET_WORDS = {
    "train", "training", "val", "valid", "validation", "dev", "tune", "tuning", "test", "testing", "holdout",
}  # fmt: skip
_SUBSET_COLUMNS = {"split", "splits", "set", "subset", "fold", "folds", "partition", "is_train", "is_test", "phase"}
_MOST_SUBSETS = 20
_SPLIT_FILE = "a splits.json of ours, a splits_<k>.csv with the columns train,val,test, or a folder of those"


@dataclass(frozen=True)
class NamedSplit:
    """One training's slides in a split file: `slides` maps train, val and test to wsi_ids.

    `name` is its place in the file. Splits with the same `repeat` and `fold` share their test slides; `repeat` is None
    if the file has none.
    """

    name: str
    fold: int
    slides: dict[str, list[str]]
    repeat: int | None = None


def read_splits(path: Path, wsi_ids: Collection[str] = ()) -> list[NamedSplit]:
    """Return the splits in `path`: our splits.json or a folder with it (one split per inner fold), a CSV table with the
    columns train,val,test as CLAM and MAD-MIL write it, or a folder of such tables `splits_<k>.csv`, sorted by k.

    An id that is not among the `wsi_ids` loses the ending of a slide or feature file. Raises SplitError for any other
    file or folder.
    """
    path = Path(path)
    if (path / "splits.json").is_file():
        path = path / "splits.json"
    if path.is_dir():
        numbers = {file: number for file in path.iterdir() if (number := _split_number(file)) is not None}
        if not numbers:
            raise SplitError(f"{path}: no splits_<k>.csv in this folder; expected {_SPLIT_FILE}")
        if len(set(numbers.values())) < len(numbers):
            raise SplitError(f"{path}: two splits_<k>.csv of one number; give each a number of its own")
        return [_read_table(file, numbers[file], wsi_ids) for file in sorted(numbers, key=numbers.__getitem__)]
    if not path.is_file():
        raise SplitError(f"{path}: no such file; expected {_SPLIT_FILE}")
    if path.stem.endswith("_descriptor"):
        raise SplitError(f"{path}: holds how many slides there are, not which; give the splits_<k>.csv beside it")
    if path.suffix.lower() == ".json":
        return _read_ours(path, wsi_ids)
    return [_read_table(path, _split_number(path) or 0, wsi_ids)]


def shared_cases(slides: Mapping[str, Collection[str]], case_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the patients with slides in more than one subset, with the names of the subsets.

    `slides` maps subsets to wsi_ids; a slide that is not in `case_of` is its own patient.
    """
    subsets_of: dict[str, list[str]] = {}
    for subset, wsi_ids in slides.items():
        for case in sorted({case_of.get(wsi_id, wsi_id) for wsi_id in wsi_ids}):
            subsets_of.setdefault(case, []).append(subset)
    return {case: subsets for case, subsets in subsets_of.items() if len(subsets) > 1}


def folds_from_file(
    path: Path,
    wsi_ids: Sequence[str],
    labels: np.ndarray,
    cases: np.ndarray,
    class_names: Sequence[str],
    *,
    unit: str = "patient",
    stratum: str = "class",
    allow_missing: bool = False,
    names: Mapping[str, Sequence[str]] | None = None,
) -> list[OuterFold]:
    """Return the folds in a file (see `read_splits`) for slides `wsi_ids` of `labels (n,)` and `cases (n,)`.

    A name in the file stands for the wsi_ids that `names` gives for it, by default for itself. If test sets overlap, as
    in repeated random splits, each split is a repeat of its own. `allow_missing` leaves out
    slides of the file that are not among the `wsi_ids`. Raises SplitError for such slides otherwise, for a patient on
    both sides of a split, for an empty subset, and for a training set without one of the classes.
    """
    splits = _by_wsi_id(path, read_splits(path, [*wsi_ids, *(names or {})]), names or {})
    index_of = {wsi_id: index for index, wsi_id in enumerate(wsi_ids)}
    if not allow_missing:
        _check_in_cohort(path, splits, wsi_ids)
    case_of = dict(zip(wsi_ids, cases.tolist(), strict=True))
    folds: dict[tuple[int, int], OuterFold] = {}
    for split in splits:
        ids = {subset: [wsi_id for wsi_id in ids if wsi_id in index_of] for subset, ids in split.slides.items()}
        _check_split(path, split.name, ids, case_of, unit)
        slides = {subset: np.array(sorted({index_of[wsi_id] for wsi_id in ids[subset]}), dtype=int) for subset in ids}
        absent = [name for label, name in enumerate(class_names) if label not in labels[slides["train"]]]
        if absent:
            raise SplitError(
                f"{path}: the train part of {split.name} has no slide of {stratum} {first_few(absent)}; mend it"
            )
        inner = InnerFold(slides["train"], slides["val"])
        key = (split.repeat or 1, split.fold)
        fold = folds.setdefault(key, OuterFold(split.fold, slides["test"], (), key[0]))
        folds[key] = replace(fold, inner=(*fold.inner, inner))
    return _numbered(path, list(folds.values()), all(split.repeat is not None for split in splits))


def is_of_cases(path: Path) -> bool:
    """Return whether splits are those of a run of ours that predicted patients, whom they name."""
    file = path / "splits.json" if path.is_dir() else path
    return file.suffix.lower() == ".json" and "slides_of_cases" in read_record(file)


def _by_wsi_id(path: Path, splits: Sequence[NamedSplit], names: Mapping[str, Sequence[str]]) -> list[NamedSplit]:
    """Return the splits with the wsi_ids that their names stand for; log an example of a name that is another's."""
    others: set[str] = set()

    def resolved(given: Sequence[str]) -> list[str]:
        ids: dict[str, None] = {}
        for name in given:
            meant = names.get(name, [name])
            others.update([] if list(meant) == [name] else [name])
            ids |= dict.fromkeys(meant)
        return list(ids)

    splits = [replace(split, slides={part: resolved(ids) for part, ids in split.slides.items()}) for split in splits]
    if others:
        example = min(others)
        log.info("%s: %s stands for %s, and so on", path, example, first_few(list(names[example])))
    return splits


def _check_in_cohort(path: Path, splits: Sequence[NamedSplit], wsi_ids: Sequence[str]) -> None:
    in_file = {wsi_id for split in splits for ids in split.slides.values() for wsi_id in ids}
    unknown = sorted(in_file - set(wsi_ids))
    if unknown:
        near = near_ids(unknown, lambda: wsi_ids)
        names = first_few([missed_id(wsi_id, near) for wsi_id in unknown])
        raise SplitError(
            f"{path}: {plural(len(unknown), 'slide')} of the splits not in the cohort: {names}; "
            f"{id_hint(near) or 'add them to the table'}, or leave them out with --allow missing"
        )


def unused_split(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the warning that a column of the label table seems to split the slides into train and test, but is not
    used; empty if there is none.
    """
    for name in rows[0] if rows else ():
        counts = Counter(row[name].strip().lower() for row in rows)
        values = counts.keys() - {""}
        has_subsets = values <= _SUBSET_WORDS and bool(values & {"train", "training"})
        has_name = name.strip().lower() in _SUBSET_COLUMNS and len(values) <= _MOST_SUBSETS
        if len(values) > 1 and (has_subsets or has_name):
            text = ", ".join(f"{value} {counts[value]}" for value in sorted(values))
            return (
                f"the column {name} ({text}) is not used: new folds are drawn over all slides; to use these splits, "
                "write them as tables train,val,test of slide ids and give --splits"
            )
    return ""


def _check_split(path: Path, name: str, slides: dict[str, list[str]], case_of: Mapping[str, str], unit: str) -> None:
    empty = [subset for subset, ids in slides.items() if not ids]
    if empty:
        raise SplitError(
            f"{path}: {name} has no slide in {' and '.join(empty)}; each of train, val and test needs some"
        )
    # This finds a slide in two subsets, too: its patient is in both.
    shared = [f"{case} ({' and '.join(subsets)})" for case, subsets in shared_cases(slides, case_of).items()]
    if shared:
        raise SplitError(
            f"{path}: {plural(len(shared), unit)} on both sides of {name}: {first_few(shared)}; such splits "
            f"overestimate every figure, so split by {unit}"
        )


def _numbered(path: Path, folds: list[OuterFold], has_repeats: bool) -> list[OuterFold]:
    """Return the folds numbered from 1, with the repeats of the file or those that the test sets imply."""
    folds = [replace(fold, number=number) for number, fold in enumerate(folds, start=1)]
    for repeat in sorted({fold.repeat for fold in folds}):
        tested = np.concatenate([fold.test for fold in folds if fold.repeat == repeat])
        if len(np.unique(tested)) == len(tested):
            continue
        if has_repeats:
            raise SplitError(f"{path}: a slide is tested by two folds of repeat {repeat}; test each once in a repeat")
        log.info("%s: the tests overlap; each of the %d splits is a repeat of its own", path, len(folds))
        return [replace(fold, repeat=fold.number) for fold in folds]
    return folds


def _split_number(path: Path) -> int | None:
    # CLAM writes splits_<k>_bool.csv and splits_<k>_descriptor.csv beside each.
    match = re.fullmatch(r"splits_(\d+)\.csv", path.name)
    return int(match[1]) if match else None


def _read_ours(path: Path, wsi_ids: Collection[str]) -> list[NamedSplit]:
    content = read_json(path, SplitError)
    try:
        splits = [
            NamedSplit(
                f"{_fold_name(fold)}, inner {number} of {path.name}",
                int(fold["fold"]),
                {subset: _plain_ids(path, (inner | {"test": fold["test"]})[subset], wsi_ids) for subset in SUBSETS},
                int(fold.get("repeat", 1)),
            )
            for fold in content["folds"]
            for number, inner in enumerate(fold["inner"], start=1)
        ]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as failure:
        raise SplitError(f"{path}: no folds as train.py writes them ({failure}); expected {_SPLIT_FILE}") from failure
    if not splits:
        raise SplitError(f"{path}: no folds in it; expected {_SPLIT_FILE}")
    names = [_fold_name(fold) for fold in content["folds"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SplitError(f"{path}: {first_few(twice)} more than once; give each fold a number of its own")
    return splits


def _fold_name(fold: Mapping[str, Any]) -> str:
    repeat = f"repeat {fold['repeat']}, " if fold.get("repeat", 1) != 1 else ""
    return f"{repeat}fold {fold['fold']}"


def _read_table(path: Path, number: int, wsi_ids: Collection[str]) -> NamedSplit:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns, *lines = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as failure:
        raise SplitError(f"{path}: not readable as a CSV table ({failure}); expected {_SPLIT_FILE}") from failure
    missing = [subset for subset in SUBSETS if columns.count(subset) != 1]
    if missing:
        header = ", ".join(name or "(unnamed)" for name in columns) or "nothing"
        raise SplitError(f"{path}: no single column {' and '.join(missing)}; found {header}, expected {_SPLIT_FILE}")
    slides = {}
    for subset in SUBSETS:
        column = columns.index(subset)
        cells = [line[column].strip() for line in lines if column < len(line)]
        slides[subset] = _plain_ids(path, [cell for cell in cells if cell], wsi_ids)
    return NamedSplit(path.name, number, slides)


def _plain_ids(path: Path, ids: Any, known_ids: Collection[str]) -> list[str]:
    if not isinstance(ids, list) or not all(isinstance(wsi_id, str) for wsi_id in ids):
        raise SplitError(f"{path}: a part that is no list of slide ids: {str(ids)[:60]}; expected {_SPLIT_FILE}")
    if ids and {wsi_id.lower() for wsi_id in ids} <= {"true", "false"}:
        raise SplitError(f"{path}: holds True and False instead of slide ids; give the splits_<k>.csv beside it")
    return [wsi_id if wsi_id in known_ids else without_ending(wsi_id) for wsi_id in ids]
