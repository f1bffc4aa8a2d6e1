import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from utils.core.errors import SplitError
from utils.core.files import write_json
from utils.learning.protocol import splits_content
from utils.learning.split_files import read_splits, shared_cases
from utils.learning.splits import OuterFold, few_patients, nested_splits

GLAS = Path(__file__).parents[2].parent / "shared" / "data" / "glas" / "labels.csv"


def table(patients: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and cases of patients given as the labels of their slides."""
    labels = [label for slides in patients for label in slides]
    cases = [f"P{number}" for number, slides in enumerate(patients) for _ in slides]
    return np.array(labels), np.array(cases)


def one_class_patients(*per_class: int, slides: int = 2) -> tuple[np.ndarray, np.ndarray]:
    return table([[label] * slides for label, count in enumerate(per_class) for _ in range(count)])


def split(labels, cases, n_outer=3, n_inner=2, seed=0) -> list[OuterFold]:
    return nested_splits(labels, cases, [f"class{label}" for label in range(labels.max() + 1)], n_outer, n_inner, seed)


def check_folds(folds: list[OuterFold], labels: np.ndarray, cases: np.ndarray) -> None:
    """What every split promises."""
    classes = set(labels.tolist())
    assert [fold.number for fold in folds] == list(range(1, len(folds) + 1))
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(len(labels)))
    for fold in folds:
        assert sorted([*fold.test, *fold.train]) == list(range(len(labels)))
        assert not set(cases[fold.test]) & set(cases[fold.train])
        assert set(labels[fold.test].tolist()) == classes
        validated = np.concatenate([inner.val for inner in fold.inner])
        assert np.array_equal(np.sort(validated), fold.train)
        for inner in fold.inner:
            assert np.array_equal(np.sort(np.concatenate([inner.train, inner.val])), fold.train)
            assert not set(cases[inner.train]) & set(cases[inner.val])
            assert set(labels[inner.val].tolist()) == set(labels[inner.train].tolist()) == classes
            assert (np.diff(inner.train) > 0).all()
            assert (np.diff(inner.val) > 0).all()


def as_lists(folds: list[OuterFold]) -> list:
    return [(fold.test.tolist(), [(i.train.tolist(), i.val.tolist()) for i in fold.inner]) for fold in folds]


@given(
    patients=st.lists(
        st.lists(st.integers(0, 2), min_size=1, max_size=3) | st.integers(0, 2).map(lambda label: [label] * 2),
        min_size=6,
        max_size=20,
    ),
    n_outer=st.integers(2, 5),
    n_inner=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
@examples(max_examples=60)
def test_folds_keep_patients_whole_and_classes_present(patients, n_outer, n_inner, seed):
    labels, cases = table(patients)
    names = [f"class{label}" for label in range(labels.max() + 1)]
    assume(labels.max() > 0)
    try:
        folds = nested_splits(labels, cases, names, n_outer, n_inner, seed)
    except SplitError as error:
        works = promised(str(error), n_outer, n_inner)
        if works is None:
            assert min(len(set(cases[labels == label])) for label in range(len(names))) < 3
            return
        assert works != (n_outer, n_inner)
        check_folds(nested_splits(labels, cases, names, *works, seed), labels, cases)
        return
    assert (len(folds), len(folds[0].inner)) == (n_outer, n_inner)
    check_folds(folds, labels, cases)


def test_folds_that_validate_on_a_single_patient_are_warned_of():
    names, (labels, cases) = ("benign", "malignant"), table([[0], [1]] * 8)
    enough, thin = (nested_splits(labels, cases, names, 2, n_inner, seed=1) for n_inner in (2, 4))
    assert few_patients(enough, labels, cases, names) == ""
    warning = few_patients(thin, labels, cases, names)
    assert warning.startswith("8 of 8 inner folds validate on one patient of a class or none (the first: outer fold 1,")
    assert "give a smaller --n_inner" in warning


def promised(message: str, n_outer: int, n_inner: int) -> tuple[int, int] | None:
    """The folds that a SplitError says would work; None where it says that none do."""
    remedy = message.split(";", 1)[1]
    if "no split would work" in remedy or "leave it out" in remedy:
        return None
    flags = {name: int(value) for name, value in re.findall(r"--(n_\w+) (\d+)", remedy)}
    return flags.get("n_outer", n_outer), flags.get("n_inner", n_inner)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0] * 6, ("benign", "malignant"), "no slide has the class 'malignant'; leave it out of --class_names"),
        (
            [0] * 6 + [1] * 6 + [2],
            ("benign", "malignant", "malignent"),
            "mend the label if 'malignant' is meant, or add",
        ),
    ],
)
def test_classes_that_are_none(labels, names, message):
    cases = np.array([f"P{number}" for number in range(len(labels))])
    with pytest.raises(SplitError, match=message):
        nested_splits(np.array(labels), cases, names, 2, 2, 0)


@pytest.mark.parametrize(
    ("fewest", "asked", "remedy"),
    [
        (4, (5, 3), "at most --n_outer 4 would work"),
        (4, (5, 4), "at most --n_outer 4 would work, with --n_inner 3"),
        (6, (5, 5), "at most --n_inner 4 would work"),
        (3, (2, 2), "--n_outer 3 would work"),
        (2, (2, 2), "no split would work"),
        (1, (5, 4), "no split would work"),
    ],
)
def test_too_few_patients_says_the_most_that_works(fewest, asked, remedy):
    labels, cases = one_class_patients(12, fewest)
    names = ("benign", "malignant")
    with pytest.raises(SplitError, match=f"only {fewest} patients? with class 'malignant'; .*{remedy}") as caught:
        nested_splits(labels, cases, names, *asked, 0)
    works = promised(str(caught.value), *asked)
    if works:
        check_folds(nested_splits(labels, cases, names, *works, 0), labels, cases)
        for more in ((works[0] + 1, works[1]), (works[0], works[1] + 1)):
            if more[0] <= asked[0] and more[1] <= asked[1]:
                with pytest.raises(SplitError):
                    nested_splits(labels, cases, names, *more, 0)


def test_a_shortage_is_of_patients_not_of_slides():
    labels, cases = table([[0]] * 10 + [[1] * 50, [1] * 50])
    with pytest.raises(SplitError, match="only 2 patients with class 'class1'"):
        split(labels, cases)


def test_a_shortage_of_groups_is_called_by_their_name():
    labels, cases = one_class_patients(12, 3)
    with pytest.raises(SplitError, match="only 3 sites with class 'malignant'"):
        nested_splits(labels, cases, ("benign", "malignant"), 5, 4, 0, unit="site")


def test_strata_that_are_no_classes_are_not_called_so():
    """Strata of numbers have names that are alike, and are no misspelt labels of each other."""
    names = ("ki67 up to 0.2", "ki67 over 0.2")
    with pytest.raises(
        SplitError, match=r"only 1 patient with stratum 'ki67 over 0.2'; .* slides of that stratum"
    ) as caught:
        nested_splits(*one_class_patients(12, 1), names, 5, 4, 0, stratum="stratum")
    assert "mend the label" not in str(caught.value)
    labels, cases = table([[0], [1]] * 8)
    thin = nested_splits(labels, cases, names, 2, 4, seed=1)
    assert "on one patient of a stratum or none" in few_patients(thin, labels, cases, names, "stratum")


def test_the_seed_alone_decides():
    labels, cases = one_class_patients(10, 10)
    assert as_lists(split(labels, cases, seed=3)) == as_lists(split(labels, cases, seed=3))
    assert len({str(as_lists(split(labels, cases, seed=seed))) for seed in range(5)}) == 5


def test_the_order_of_the_rows_does_not_move_patients():
    labels, cases = table([[0, 0]] * 8 + [[1, 1]] * 7 + [[0, 1]])
    order = np.random.default_rng(0).permutation(len(labels))

    def patients(labels, cases):
        return [sorted(set(cases[fold.test])) for fold in split(labels, cases)]

    assert patients(labels, cases) == patients(labels[order], cases[order])


def test_patients_of_each_class_are_dealt_evenly():
    labels, cases = one_class_patients(13, 7, 26)
    folds = split(labels, cases, n_outer=5, n_inner=4)
    check_folds(folds, labels, cases)
    for label, count in enumerate((13, 7, 26)):
        for parts, total in [([fold.test for fold in folds], count)] + [
            ([inner.val for inner in fold.inner], len(set(cases[fold.train][labels[fold.train] == label])))
            for fold in folds
        ]:
            dealt = [len(set(cases[part][labels[part] == label])) for part in parts]
            assert sum(dealt) == total
            assert max(dealt) - min(dealt) <= 1


def test_a_patient_of_forty_slides_weighs_like_any_other():
    labels, cases = table([[0] * 40] + [[0]] * 8 + [[1]] * 9)
    for fold in split(labels, cases, n_outer=3):
        assert len(set(cases[fold.test])) == 6


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("n_outer", "patients"),
    [
        (3, [[0, 1, 2], [2], [2], [1], [0, 1, 2], [0], [0]]),
        (3, [[0, 2], [1], [0, 1, 2], [0, 1], [1, 2]]),
        (4, [[0, 2], [0, 1], [0], [1, 2], [0, 1], [0, 1, 2], [0, 2]]),
        (3, [[0], [0, 1], [1], [0], [0, 1], [2], [2], [1, 2]]),
    ],
)
def test_patients_of_several_classes_are_spread(n_outer, patients, seed):
    """Where they are not, there is a fold without a class: so with scikit-learn's StratifiedGroupKFold, or when the
    commonest class is dealt first.
    """
    labels, cases = table(patients)
    check_folds(split(labels, cases, n_outer=n_outer, n_inner=2, seed=seed), labels, cases)


@pytest.mark.skipif(not GLAS.is_file(), reason=f"the GlaS label table is not at {GLAS}")
@pytest.mark.parametrize("seed", [0, 1, 7, 42, 1234])
def test_glas_at_the_default_folds(seed):
    rows = pd.read_csv(GLAS, dtype=str)
    labels = (rows["label"] == "malignant").to_numpy().astype(int)
    cases = rows["case_id"].to_numpy(dtype=str)
    folds = nested_splits(labels, cases, ("benign", "malignant"), 5, 4, seed)
    assert (len(folds), {len(fold.inner) for fold in folds}) == (5, {4})
    check_folds(folds, labels, cases)


def test_our_own_split_file_reads_back(tmp_path):
    labels, cases = one_class_patients(4, 4)
    folds = split(labels, cases)
    ids = [f"S{slide}" for slide in range(len(labels))]
    data = SimpleNamespace(rows=[SimpleNamespace(wsi_id=wsi_id) for wsi_id in ids], unit="slide")
    write_json(tmp_path / "splits.json", splits_content(data, folds, seed=0))  # type: ignore[arg-type]
    found = read_splits(tmp_path / "splits.json")
    expected = [(fold.number, inner.train, inner.val, fold.test) for fold in folds for inner in fold.inner]
    assert len(found) == 6
    for got, (number, *parts) in zip(found, expected, strict=True):
        assert got.fold == number
        assert got.slides == {
            name: [ids[slide] for slide in part] for name, part in zip(("train", "val", "test"), parts, strict=True)
        }
        assert not shared_cases(got.slides, dict(zip(ids, cases.tolist(), strict=True)))
    assert found[3].name == "fold 2, inner 2 of splits.json"
