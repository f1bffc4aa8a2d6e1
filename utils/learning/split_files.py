"""Split files of a training run, of CLAM and of MAD-MIL, and the folds they deal to a cohort.

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
from utils.core.files import read_json
from utils.core.runtime import log
from utils.learning.splits import InnerFold, OuterFold

PARTS = ("train", "val", "test")
# What columns call the parts of a split.
_PART_WORDS = {"train", "training", "val", "valid", "validation", "dev", "tune", "tuning", "test", "testing", "holdout"}
_PART_COLUMNS = {"split", "splits", "set", "subset", "fold", "folds", "partition", "is_train", "is_test", "phase"}
_MOST_PARTS = 20
_SPLIT_FILE = "a splits.json of ours, a splits_<k>.csv with the columns train,val,test, or a folder of those"


@dataclass(frozen=True)
class NamedSplit:
    """One training's slides as a file gives them: `parts` maps train, val and test to wsi_ids. `name` says where it
    stands; splits with the same `repeat` and `fold` share their test part. `repeat` None where the file tells none.
    """

    name: str
    fold: int
    parts: dict[str, list[str]]
    repeat: int | None = None


def read_splits(path: Path, known: Collection[str] = ()) -> list[NamedSplit]:
    """The splits in `path`: our splits.json, or a folder with it (one split for each inner fold); a CSV table with the
    columns train,val,test as CLAM and MAD-MIL write it, or a folder of such tables, `splits_<k>.csv`, by their k.

    An id that is not among `known` ones loses the ending of a slide or feature file. Raises SplitError for anything
    else.
    """
    path = Path(path)
    if (path / "splits.json").is_file():
        path = path / "splits.json"
    if path.is_dir():
        numbered = {int(found[1]): file for file in path.iterdir() if (found := _split_number(file))}
        if not numbered:
            raise SplitError(f"{path}: no splits_<k>.csv in this folder; expected {_SPLIT_FILE}")
        if len(numbered) < sum(_split_number(file) is not None for file in path.iterdir()):
            raise SplitError(f"{path}: two splits_<k>.csv of one number; give each a number of its own")
        return [_read_table(file, number, known) for number, file in sorted(numbered.items())]
    if not path.is_file():
        raise SplitError(f"{path}: no such file; expected {_SPLIT_FILE}")
    if path.stem.endswith("_descriptor"):
        raise SplitError(f"{path}: holds how many slides there are, not which; give the splits_<k>.csv beside it")
    if path.suffix.lower() == ".json":
        return _read_ours(path, known)
    number = _split_number(path)
    return [_read_table(path, int(number[1]) if number else 0, known)]


def shared_cases(parts: Mapping[str, Collection[str]], case_of: Mapping[str, str]) -> dict[str, list[str]]:
    """The patients with slides in more than one of `parts` (name to wsi_ids), with the names of those parts; an id
    that `case_of` does not know is its own patient.
    """
    found: dict[str, list[str]] = {}
    for name, wsi_ids in parts.items():
        for case in sorted({case_of.get(wsi_id, wsi_id) for wsi_id in wsi_ids}):
            found.setdefault(case, []).append(name)
    return {case: names for case, names in found.items() if len(names) > 1}


def given_splits(
    path: Path,
    wsi_ids: Sequence[str],
    labels: np.ndarray,
    cases: np.ndarray,
    class_names: Sequence[str],
    *,
    unit: str = "patient",
    allow_missing: bool = False,
) -> list[OuterFold]:
    """Return the folds that a file (see `read_splits`) deals to slides `wsi_ids` of `labels (n,)` and `cases (n,)`.

    Splits whose tests overlap (random ones drawn again and again) are each a repeat of their own. `allow_missing`
    leaves out slides of the file that are none of `wsi_ids`. Raises SplitError for such slides, for a patient on both
    sides of a split, for an empty part, and for a training part without one of the classes.
    """
    splits = read_splits(path, wsi_ids)
    index_of = {wsi_id: index for index, wsi_id in enumerate(wsi_ids)}
    if not allow_missing:
        _check_in_cohort(path, splits, wsi_ids)
    case_of = dict(zip(wsi_ids, cases.tolist(), strict=True))
    folds: dict[tuple[int, int], OuterFold] = {}
    for split in splits:
        ids = {name: [wsi_id for wsi_id in part if wsi_id in index_of] for name, part in split.parts.items()}
        _check_given(path, split.name, ids, case_of, unit)
        slides = {name: np.array(sorted({index_of[wsi_id] for wsi_id in ids[name]}), dtype=int) for name in ids}
        lacking = [name for label, name in enumerate(class_names) if label not in labels[slides["train"]]]
        if lacking:
            raise SplitError(
                f"{path}: the train part of {split.name} has no slide of class {first_few(lacking)}; mend it"
            )
        inner = InnerFold(slides["train"], slides["val"])
        key = (split.repeat or 1, split.fold)
        fold = folds.setdefault(key, OuterFold(split.fold, slides["test"], (), key[0]))
        folds[key] = replace(fold, inner=(*fold.inner, inner))
    return _with_repeats(path, list(folds.values()), all(split.repeat is not None for split in splits))


def _check_in_cohort(path: Path, splits: Sequence[NamedSplit], wsi_ids: Sequence[str]) -> None:
    listed = {wsi_id for split in splits for part in split.parts.values() for wsi_id in part}
    strangers = sorted(listed - set(wsi_ids))
    if strangers:
        near = near_ids(strangers, lambda: wsi_ids)
        names = first_few([missed_id(wsi_id, near) for wsi_id in strangers])
        raise SplitError(
            f"{path}: {plural(len(strangers), 'slide')} of the splits not in the cohort: {names}; "
            f"{id_hint(near) or 'add them to the table'}, or leave them out with --allow missing"
        )


def unused_split(rows: Sequence[Mapping[str, str]]) -> str:
    """Return what to say of a column of a label table that parts its slides into train and test, which folds that are
    dealt do not heed; empty where no column does.
    """
    for name in rows[0] if rows else ():
        counts = Counter(row[name].strip().lower() for row in rows)
        parts = counts.keys() - {""}
        says_so = parts <= _PART_WORDS and bool(parts & {"train", "training"})
        is_called_so = name.strip().lower() in _PART_COLUMNS and len(parts) <= _MOST_PARTS
        if len(parts) > 1 and (says_so or is_called_so):
            found = ", ".join(f"{part} {counts[part]}" for part in sorted(parts))
            return (
                f"the column {name} ({found}) is not used: folds are dealt anew over all slides; for given ones write "
                "tables train,val,test of ids and give --splits"
            )
    return ""


def _check_given(path: Path, name: str, parts: dict[str, list[str]], case_of: Mapping[str, str], unit: str) -> None:
    empty = [part for part, ids in parts.items() if not ids]
    if empty:
        raise SplitError(
            f"{path}: {name} has no slide in {' and '.join(empty)}; each of train, val and test needs some"
        )
    # A slide that stands in two parts is found here too: its patient does.
    shared = [f"{case} ({' and '.join(places)})" for case, places in shared_cases(parts, case_of).items()]
    if shared:
        raise SplitError(
            f"{path}: {plural(len(shared), unit)} on both sides of {name}: {first_few(shared)}; such splits "
            f"overestimate every figure, so split by {unit}"
        )


def _with_repeats(path: Path, folds: list[OuterFold], are_told: bool) -> list[OuterFold]:
    """The folds numbered from 1, with the repeats that the file tells or that follow from the tests."""
    folds = [replace(fold, number=number) for number, fold in enumerate(folds, start=1)]
    for repeat in sorted({fold.repeat for fold in folds}):
        tested = np.concatenate([fold.test for fold in folds if fold.repeat == repeat])
        if len(np.unique(tested)) == len(tested):
            continue
        if are_told:
            raise SplitError(f"{path}: a slide is tested by two folds of repeat {repeat}; test each once in a repeat")
        log.info("%s: the tests overlap; each of the %d splits is a repeat of its own", path, len(folds))
        return [replace(fold, repeat=fold.number) for fold in folds]
    return folds


def _split_number(path: Path) -> re.Match[str] | None:
    # CLAM writes splits_<k>_bool.csv and splits_<k>_descriptor.csv beside each.
    return re.fullmatch(r"splits_(\d+)\.csv", path.name)


def _read_ours(path: Path, known: Collection[str]) -> list[NamedSplit]:
    content = read_json(path, SplitError)
    try:
        splits = [
            NamedSplit(
                f"{_place(fold)}, inner {number} of {path.name}",
                int(fold["fold"]),
                {name: _plain_ids(path, part[name], known) for name in PARTS},
                int(fold.get("repeat", 1)),
            )
            for fold in content["folds"]
            for number, inner in enumerate(fold["inner"], start=1)
            for part in [inner | {"test": fold["test"]}]
        ]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as failure:
        raise SplitError(f"{path}: no folds as train.py writes them ({failure}); expected {_SPLIT_FILE}") from failure
    if not splits:
        raise SplitError(f"{path}: no folds in it; expected {_SPLIT_FILE}")
    places = [_place(fold) for fold in content["folds"]]
    twice = sorted({place for place in places if places.count(place) > 1})
    if twice:
        raise SplitError(f"{path}: {first_few(twice)} more than once; give each fold a number of its own")
    return splits


def _place(fold: Mapping[str, Any]) -> str:
    repeat = f"repeat {fold['repeat']}, " if fold.get("repeat", 1) != 1 else ""
    return f"{repeat}fold {fold['fold']}"


def _read_table(path: Path, number: int, known: Collection[str]) -> NamedSplit:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns, *lines = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as failure:
        raise SplitError(f"{path}: not readable as a CSV table ({failure}); expected {_SPLIT_FILE}") from failure
    missing = [name for name in PARTS if columns.count(name) != 1]
    if missing:
        found = ", ".join(name or "(unnamed)" for name in columns) or "nothing"
        raise SplitError(f"{path}: no single column {' and '.join(missing)}; found {found}, expected {_SPLIT_FILE}")
    parts = {}
    for name in PARTS:
        place = columns.index(name)
        cells = [line[place].strip() for line in lines if place < len(line)]
        parts[name] = _plain_ids(path, [cell for cell in cells if cell], known)
    return NamedSplit(path.name, number, parts)


def _plain_ids(path: Path, ids: Any, known: Collection[str]) -> list[str]:
    if not isinstance(ids, list) or not all(isinstance(wsi_id, str) for wsi_id in ids):
        raise SplitError(f"{path}: a part that is no list of slide ids: {str(ids)[:60]}; expected {_SPLIT_FILE}")
    if ids and {wsi_id.lower() for wsi_id in ids} <= {"true", "false"}:
        raise SplitError(f"{path}: holds True and False instead of slide ids; give the splits_<k>.csv beside it")
    return [wsi_id if wsi_id in known else without_ending(wsi_id) for wsi_id in ids]
