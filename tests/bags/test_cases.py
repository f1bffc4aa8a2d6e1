"""Bags of all slides of a patient."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cohort import write_cohort
from utils.bags.cases import CaseFeatures, JoinedFeatures, case_rows
from utils.bags.dataset import on_device, shared
from utils.bags.labels import LabelRow
from utils.bags.store import Bag, open_bag, write_bag
from utils.core.errors import ConfigError, LabelsError
from utils.mil_dataset import MILDataset


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> tuple[Path, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"), patients_per_class=3)


def row(slide: str, case: str, label: int = 0, **columns: str) -> LabelRow:
    return LabelRow(slide, case, label, Path(f"{slide}.h5"), {"wsi_id": slide, "case_id": case, **columns})


def test_a_patient_has_a_row_in_the_order_of_the_first_slides():
    rows, slides_of = case_rows(
        [row("a", "P", age="61", stain="1"), row("b", "Q", 1, age="50"), row("c", "P", age="61", stain="2")],
        Path("labels.csv"),
    )
    assert [(each.wsi_id, each.case_id, each.label) for each in rows] == [("P", "P", 0), ("Q", "Q", 1)]
    assert slides_of == [[0, 2], [1]]
    assert rows[0].columns == {}, "they stay with the slides"


def test_slides_of_one_patient_must_share_their_label():
    with pytest.raises(LabelsError, match=r"labels\.csv: --unit case: 1 patient with slides of different labels: P"):
        case_rows([row("a", "P", 0), row("b", "P", 1)], Path("labels.csv"))


@pytest.mark.parametrize("cache", ["ram", "off", "folder"])
def test_the_bag_of_a_patient_is_all_slides_in_the_order_of_the_table(cache, cohort, tmp_path):
    cache = str(tmp_path / "packed") if cache == "folder" else cache
    slides, cases = MILDataset(*cohort, cache=cache), MILDataset(*cohort, cache=cache, unit="case")
    assert len(cases) == len(set(slides.cases)) < len(slides)
    assert len(set(cases.cases)) == len(cases) == len(cases.groups)
    for bag, numbers in enumerate(cases.slides_of):
        expected = torch.cat([slides.features(number) for number in numbers])
        assert torch.equal(cases.features(bag), expected)
        assert cases.info[bag].num_instances == len(expected)
        assert cases.labels[bag] == slides.labels[numbers[0]]
        assert cases.rows[bag].wsi_id == slides.cases[numbers[0]]
    for_all = shared(cases, tmp_path / "shared")
    assert torch.equal(for_all.features(3), cases.features(3))
    seen = np.concatenate([batch.slides for batch in cases.batches([0, 1, 2], 4, 0)])
    assert set(seen.tolist()) == {0, 1, 2}, "an epoch is of patients"
    records = cases.inventory({})
    assert [record.wsi_id for record in records] == [row.wsi_id for row in slides.rows]


def test_the_bags_of_patients_are_kept_on_a_device(cohort, monkeypatch):
    monkeypatch.setattr("utils.bags.device_features.free_memory", lambda _: 2**30)
    cases = MILDataset(*cohort, unit="case")
    kept = on_device(cases, torch.device("cpu"))
    for bag in range(len(cases)):
        assert torch.equal(kept.features(bag), cases.features(bag).half())


def test_an_unknown_unit_is_refused(cohort):
    with pytest.raises(ConfigError, match=r"--unit 'patient'.*slide.*case"):
        MILDataset(*cohort, unit="patient")  # type: ignore[arg-type]


def test_features_of_one_slide_are_not_copied():
    features = torch.zeros(3, 2)
    assert CaseFeatures(lambda _: features, [[0]])(0) is features


def test_joined_features_are_read_slide_by_slide(tmp_path):
    bags = [np.random.default_rng(seed).random((5 + seed, 4), dtype=np.float32) for seed in range(3)]
    for number, features in enumerate(bags):
        write_bag(tmp_path / f"{number}.h5", Bag(features))
    stored = [open_bag(tmp_path / f"{number}.h5").features for number in (0, 1)]
    joined = JoinedFeatures([*stored, torch.from_numpy(bags[2])])
    whole = np.concatenate(bags)
    assert (len(joined), joined.shape) == (18, (18, 4))
    assert np.array_equal(joined.whole().numpy(), whole)
    blocks = list(joined.blocks(4))
    assert max(map(len, blocks)) == 4
    assert np.array_equal(torch.cat(blocks).numpy(), whole)


def test_of_several_labels_a_patient_has_what_is_known_of_any_slide():
    nan = float("nan")
    rows = [row("a", "P", (1.0, nan, nan)), row("b", "P", (nan, 0.0, nan))]  # type: ignore[arg-type]
    (merged,), _ = case_rows(rows, Path("labels.csv"))
    assert str(merged.label) == "(1.0, 0.0, nan)"
    with pytest.raises(LabelsError, match="different labels: P"):
        case_rows([*rows, row("c", "P", (0.0, nan, nan))], Path("labels.csv"))  # type: ignore[arg-type]
