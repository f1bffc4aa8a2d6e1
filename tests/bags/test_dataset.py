"""A cohort is fed whole: every slide, every patch, once an epoch, in an order that the seed alone decides."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import utils.bags.dataset as mil_dataset
from tests.cohort import synthetic_bag, synthetic_passport, write_cohort
from utils.bags import cohort_features
from utils.bags.dataset import MILDataset
from utils.bags.packed import FileFeatures
from utils.bags.settings import Cohort
from utils.bags.store import Bag, write_bag
from utils.core.errors import ConfigError, FeatureFileError, LabelsError, RecipeError
from utils.core.passport import Passport
from utils.core.recipe import Recipe
from utils.core.runtime import log


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """8 slides of 4 patients, of 20 to 60 patches."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), patients_per_class=2, dim=4)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    return lambda: caplog.text


def make(folder: Path, bags: Mapping[str, Bag | np.ndarray], endings: Mapping[str, str] | None = None):
    """A table with slides of alternating class, each its own patient, and their feature files."""
    features_dir = folder / "features"
    lines = ["case_id,wsi_id,label"]
    for number, (wsi_id, bag) in enumerate(bags.items()):
        ending = (endings or {}).get(wsi_id, "h5")
        write_bag(features_dir / f"{wsi_id}.{ending}", bag if isinstance(bag, Bag) else Bag(bag))
        lines.append(f"P{number},{wsi_id},{'benign' if number % 2 == 0 else 'malignant'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv", features_dir


def numbered(lengths, dtype="f4") -> dict[str, np.ndarray]:
    """Bags in which each row says its slide and its patch: (slide + 1, patch + 1)."""
    return {
        f"S{slide}": np.stack([np.full(length, slide + 1), np.arange(length) + 1], axis=1).astype(dtype)
        for slide, length in enumerate(lengths)
    }


def patches_in(batches) -> list[tuple[int, int]]:
    """(slide, patch) of every row."""
    found = []
    for batch in batches:
        for bag, slide in zip(batch.bags, batch.slides.tolist(), strict=True):
            assert (bag[:, 0] == slide + 1).all(), "a chunk holds patches of another slide than it says"
            found += [(slide, patch - 1) for patch in bag[:, 1].long().tolist()]
    return found


def tensors_of(batch) -> list[torch.Tensor]:
    return [torch.cat([bag.flatten() for bag in batch.bags]), batch.labels, batch.weights, batch.slides]


def equal(one, other) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        torch.equal(left, right)
        for first, second in zip(one, other, strict=True)
        for left, right in zip(tensors_of(first), tensors_of(second), strict=True)
    )


# Slides


def test_slides_are_those_of_the_table_in_its_order(cohort):
    dataset = MILDataset(*cohort)
    table = [line.split(",") for line in cohort[0].read_text().splitlines()[1:]]
    assert len(dataset) == len(table) == 8
    assert [row.wsi_id for row in dataset.rows] == [wsi_id for _, wsi_id, _ in table]
    assert dataset.cases.tolist() == [case_id for case_id, _, _ in table]
    assert dataset.class_names == ("benign", "malignant")
    assert [dataset.class_names[label] for label in dataset.labels] == [label for _, _, label in table]
    assert dataset.input_dim == 4
    for slide, info in enumerate(dataset.info):
        features, label = dataset[slide]
        bag = dataset.bag(slide)
        assert features.shape == (info.num_instances, 4)
        assert features.dtype == torch.float16
        assert label == dataset.labels[slide]
        np.testing.assert_array_equal(features.numpy(), bag.features)
        assert bag.coords is not None
        assert bag.coords.shape == (info.num_instances, 2)
        assert bag.passport is not None
        assert bag.passport.slide["name"] == dataset.rows[slide].wsi_id


def test_class_names_give_the_order_of_the_classes(cohort):
    one = MILDataset(*cohort)
    other = MILDataset(*cohort, class_names=["malignant", "benign"])
    assert other.class_names == ("malignant", "benign")
    assert (one.labels + other.labels == 1).all()


@pytest.mark.parametrize("classes", [["benign"], ["benign", "benign"]])
def test_a_classifier_needs_two_classes(cohort, classes):
    with pytest.raises(LabelsError, match="needs two different ones"):
        MILDataset(*cohort, class_names=classes)


def test_class_names_are_parted_by_blanks(cohort):
    with pytest.raises(
        LabelsError, match=r"two different ones; separate the names by blanks: --class_names benign malignant$"
    ):
        MILDataset(*cohort, class_names=["benign,malignant"])
    with pytest.raises(LabelsError, match=r"two different ones$"):
        MILDataset(*cohort, class_names=["benign"])


def test_names_of_labels_and_labels_left_out_shape_the_default_classes(tmp_path):
    labels_csv, features_dir = make(tmp_path, numbered([3, 3, 3, 3]))
    labels_csv.write_text("wsi_id,label\nS0,0\nS1,1\nS2,rare\nS3,0\n")
    names = {"0": "Low", "1": "High"}
    dataset = MILDataset(labels_csv, features_dir, label_names=names, left_out=["rare"], no_patients=True)
    assert dataset.class_names == ("Low", "High"), "the rarer one is last"
    assert [dataset.class_names[label] for label in dataset.labels] == ["Low", "High", "Low"]


def test_ids_may_hold_dots(tmp_path):
    bags = numbered([2, 3, 4, 5])
    names = ["TCGA-A1.B34C267B", "TCGA-A1.C0FFEE", "TCGA-A1", "TCGA-A1.h5"]
    paths = make(tmp_path, dict(zip(names, bags.values(), strict=True)), {names[1]: "pt"})
    dataset = MILDataset(*paths)
    assert [row.wsi_id for row in dataset.rows] == names
    assert [len(features) for features, _ in (dataset[slide] for slide in range(4))] == [2, 3, 4, 5]


@pytest.mark.parametrize("ending", ["h5", "hdf5", "pt", "pth"])
def test_features_of_any_of_our_endings_are_found(tmp_path, ending):
    bags = numbered([2, 3])
    assert len(MILDataset(*make(tmp_path, bags, dict.fromkeys(bags, ending)))) == 2


def test_two_files_of_one_slide_are_an_error(tmp_path):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3]))
    write_bag(features_dir / "S1.pt", Bag(np.ones((3, 2), "f4")))
    with pytest.raises(LabelsError, match=r"slide S1 has S1\.h5 and S1\.pt; keep one of them"):
        MILDataset(labels_csv, features_dir)


def test_patients_are_named_or_their_absence_is_meant(tmp_path, said):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3]))
    labels_csv.write_text("wsi_id,label\nS0,a\nS1,b\n")
    with pytest.raises(LabelsError, match="--no_patients"):
        MILDataset(labels_csv, features_dir)
    dataset = MILDataset(labels_csv, features_dir, no_patients=True)
    assert (dataset.patients_from, dataset.cases.tolist()) == (None, ["S0", "S1"])
    assert "WARNING" in said(), "it stays under --quiet"
    labels_csv.write_text("patient_id,wsi_id,label\nP1,S0,a\nP1,S1,b\n")
    assert MILDataset(labels_csv, features_dir).cases.tolist() == ["P1", "P1"]


def test_names_that_stand_for_one_are_refused_unless_they_differ(tmp_path):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3]))
    labels_csv.write_text("case_id,wsi_id,label,site\nP1,S0,a,x\np1,S1,b,x\n")
    with pytest.raises(LabelsError, match=r"patient 'P1' and 'p1' .*--allow spelling"):
        MILDataset(labels_csv, features_dir)
    assert len(set(MILDataset(labels_csv, features_dir, allow=["spelling"]).cases)) == 2
    assert len(set(MILDataset(labels_csv, features_dir, group_column="site").groups)) == 1


def test_features_in_subfolders_are_found_and_packed(tmp_path, reads):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3, 4, 5]))
    flat = [features for features, _ in MILDataset(labels_csv, features_dir)]
    for number in range(4):
        (features_dir / f"site{number % 2}").mkdir(exist_ok=True)
        (features_dir / f"S{number}.h5").rename(features_dir / f"site{number % 2}" / f"S{number}.h5")
    for cache in (None, "off", tmp_path / "cache"):
        dataset = MILDataset(labels_csv, features_dir, cache=cache)
        assert all(torch.equal(features, one) for (features, _), one in zip(dataset, flat, strict=True))
    reads.clear()
    some = tmp_path / "some.csv"
    some.write_text("\n".join(labels_csv.read_text().splitlines()[:3]))
    assert len(MILDataset(some, features_dir, cache=tmp_path / "cache")) == 2
    MILDataset(labels_csv, features_dir, cache=tmp_path / "cache")
    assert reads == []


def test_one_id_in_two_subfolders_is_told_by_name(tmp_path):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3, 4]))
    for name in ("S1", "S9"):
        write_bag(features_dir / "other" / f"{name}.h5", Bag(np.ones((3, 2), "f4")))
        write_bag(features_dir / f"{name}.h5", Bag(np.ones((3, 2), "f4")))
    with pytest.raises(LabelsError, match=r"slide S1 has S1\.h5 and other/S1\.h5; keep one of them, or give the sub"):
        MILDataset(labels_csv, features_dir)


def test_a_slide_without_a_file_is_an_error_unless_allowed(tmp_path, said):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3, 4]))
    (features_dir / "S1.h5").unlink()
    (features_dir / "S1.h5").mkdir()
    with pytest.raises(LabelsError, match="without a feature file: S1"):
        MILDataset(labels_csv, features_dir)
    dataset = MILDataset(labels_csv, features_dir, allow=["missing"])
    assert [row.wsi_id for row in dataset.rows] == ["S0", "S2"]
    assert "S1; left out" in said()


def test_a_damaged_file_is_an_error_by_its_name(tmp_path):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3, 4]))
    (features_dir / "S1.h5").write_text("no features")
    with pytest.raises(FeatureFileError, match=r"S1\.h5: not a readable HDF5 file"):
        MILDataset(labels_csv, features_dir, allow=["missing", "unknown", "duplicate"])


def test_all_files_that_cannot_be_used_are_told_at_once(tmp_path):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3, 4, 5, 6, 7, 8]))
    for number in range(6):
        (features_dir / f"S{number}.h5").write_text("no features")
    with pytest.raises(FeatureFileError, match=r"6 of 7 feature files cannot be used: .*S0\.h5: not a") as caught:
        MILDataset(labels_csv, features_dir)
    assert "S4.h5: not a readable HDF5 file" in str(caught.value)
    assert "S5.h5" not in str(caught.value)
    assert "; and 1 more" in str(caught.value)


def test_what_only_reading_shows_is_told_with_the_rest(tmp_path):
    bags = numbered([2, 3, 4])
    bags["S1"][1, 1] = np.nan
    labels_csv, features_dir = make(tmp_path, bags)
    (features_dir / "S0.h5").write_text("no features")
    with pytest.raises(
        FeatureFileError, match=r"2 of 3 feature files cannot be used: .*S0\.h5.*S1\.h5: 1 values are NaN"
    ):
        MILDataset(labels_csv, features_dir)


def test_values_that_are_not_finite_are_found_when_they_are_read(tmp_path):
    bags = numbered([2, 3])
    bags["S1"][1, 1] = np.nan
    dataset = MILDataset(*make(tmp_path, bags))
    with pytest.raises(FeatureFileError, match=r"S1\.h5: 1 values are NaN"):
        list(dataset.batches([0, 1], 2, seed=0))


def test_differing_widths_are_named(tmp_path):
    bags = numbered([2, 3, 4]) | {"S2": np.ones((4, 5), "f4")}
    with pytest.raises(FeatureFileError, match=r"S2\.h5: features are 5 wide, those of .*S0\.h5 are 2"):
        MILDataset(*make(tmp_path, bags))


def test_all_files_of_another_width_are_told_whatever_comes_first(tmp_path):
    bags = numbered([2, 3, 4, 5, 6]) | {"S0": np.ones((4, 5), "f4"), "S3": np.ones((4, 7), "f4")}
    told = r"2 of 5 .*S0\.h5: features are 5 wide, those of .*S1\.h5 are 2; .*S3\.h5: features are 7 wide, .*; extract"
    with pytest.raises(FeatureFileError, match=told):
        MILDataset(*make(tmp_path, bags))


def test_all_files_of_another_recipe_are_told(tmp_path):
    bags = {"S0": recipe_bag(), "S1": recipe_bag(backbone="uni"), "S2": recipe_bag(), "S3": recipe_bag(patch_size=64)}
    told = r"S1\.h5: made .*backbone.*; .*S3\.h5: made .*patch_size.*; extract"
    with pytest.raises(RecipeError, match=told):
        MILDataset(*make(tmp_path, bags))


def recipe_bag(**changes) -> Bag:
    passport = synthetic_passport("slide")
    return Bag(
        np.ones((3, 2), "f4"),
        passport=dataclasses.replace(passport, recipe=dataclasses.replace(passport.recipe, **changes)),
    )


@pytest.mark.parametrize(
    "change",
    [{"backbone": "uni"}, {"weights_digest": "f" * 64}, {"transform": {"resize": 224}}, {"patch_size": 512}],
    ids=lambda change: next(iter(change)),
)
def test_differing_recipes_are_named(tmp_path, change):
    paths = make(tmp_path, {"S0": Bag(np.ones((3, 2), "f4")), "S1": recipe_bag(), "S2": recipe_bag(**change)})
    name = next(iter(change))
    differs = rf"S2\.h5: made in another way than .*S1\.h5 \({name}\S*: found .*, expected"
    with pytest.raises(RecipeError, match=differs):
        MILDataset(*paths)


def test_a_difference_that_many_files_share_is_told_once(tmp_path):
    same = {f"A{number}": recipe_bag() for number in range(10)}
    other = {f"S{number}": recipe_bag(patch_size=512) for number in range(7)}
    with pytest.raises(RecipeError) as caught:
        MILDataset(*make(tmp_path, same | other))
    told = str(caught.value)
    assert told.count("made in another way") == 1
    assert "S4.h5 and 2 more: made in another way" in told


def test_a_recipe_recorded_in_part_hides_no_difference(tmp_path):
    def partial(**recipe) -> Bag:
        return Bag(np.ones((3, 2), "f4"), passport=Passport(Recipe(**recipe)))

    bags = {"S0": partial(backbone="uni"), "S1": partial(backbone="uni", magnification=20.0)}
    assert len(MILDataset(*make(tmp_path / "one", bags))) == 2
    bags |= {"S2": partial(magnification=10.0)}
    with pytest.raises(RecipeError, match=r"S2\.h5: made in another way than .*S1\.h5 \(magnification: found 10"):
        MILDataset(*make(tmp_path / "other", bags))


def test_recipes_that_differ_where_features_stay_comparable_are_one_cohort(tmp_path):
    bags = {"S0": recipe_bag(), "S1": recipe_bag(stride=128, dtype="float32", tissue_threshold=0.1, level=0)}
    bags |= {"S2": recipe_bag(weights_digest=None), "S3": Bag(np.ones((3, 2), "f4"))}
    dataset = MILDataset(*make(tmp_path, bags))
    assert dataset.recipe == synthetic_passport("slide").recipe


def test_recipe_and_mpp_are_those_recorded_or_unknown(tmp_path, cohort):
    dataset = MILDataset(*cohort)
    assert dataset.recipe == synthetic_passport("x").recipe
    assert dataset.mpp_range == (0.5, 0.5)
    bare = MILDataset(*make(tmp_path / "bare", numbered([2, 3])))
    assert bare.recipe is None
    assert bare.mpp_range is None
    bags = {}
    for number, mpp in enumerate([None, 0.26, 0.22, 0.25]):
        passport = synthetic_passport("slide")
        passport.slide["mpp_delivered"] = mpp
        bags[f"S{number}"] = Bag(np.ones((3, 2), "f4"), passport=passport)
    assert MILDataset(*make(tmp_path / "some", bags)).mpp_range == (0.22, 0.26)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "chunk"}, "--mode 'chunk': expected one of chunked, full; did you mean chunked"),
        ({"chunk_size": 0}, "--chunk_size 0: out of range"),
        ({"class_names": [0, 1]}, r"--class_names \[0, 1\]: expected a list of text"),
        ({"allow": "missing"}, "--allow 'missing': expected a list"),
        ({"mode": "full", "sequential": True}, "--sequential: whole slides are not cut"),
        ({"label_names": ["benign"]}, r"label_names \['benign'\]: expected names by label"),
        ({"label_names": {"benign": 1}}, r"label_names \{'benign': 1\}: expected names by label"),
        ({"label_names": {0: "benign"}}, r"label_names \{0: 'benign'\}: expected names by label"),
        ({"left_out": "benign"}, "left_out 'benign': expected a list of labels"),
        ({"left_out": [1]}, r"left_out \[1\]: expected a list of labels"),
        ({"cache": 5}, "--cache 5: expected text"),
    ],
)
def test_settings_that_cannot_be_used(cohort, settings, message):
    with pytest.raises(ConfigError, match=message):
        MILDataset(*cohort, **settings)


@pytest.mark.parametrize("missing", ["csv_path", "features_dir"])
def test_a_cohort_has_a_table_and_a_folder(cohort, missing):
    paths = dict(zip(("csv_path", "features_dir"), cohort, strict=True)) | {missing: None}
    with pytest.raises(ConfigError, match=f"{missing} None: expected a path"):
        MILDataset(**paths)


@pytest.mark.parametrize("batch_size", [-1, 0, 2.5, True, None, "all"])
def test_a_batch_holds_a_whole_number_of_chunks(cohort, batch_size):
    with pytest.raises(ConfigError, match=f"--batch_size {batch_size!r}: (expected a whole|out of range)"):
        next(MILDataset(*cohort).batches([0, 1], batch_size, seed=0))


def test_an_epoch_has_slides(cohort):
    with pytest.raises(ConfigError, match="batches of no slides; give the number of at least one"):
        next(MILDataset(*cohort).batches([], 4, seed=0))


def test_folders_and_tables_that_are_not_there(cohort, tmp_path):
    with pytest.raises(FeatureFileError, match="no such folder; give the folder of feature files"):
        MILDataset(cohort[0], tmp_path / "nowhere")
    with pytest.raises(LabelsError, match="no such file"):
        MILDataset(tmp_path / "nowhere.csv", cohort[1])


def test_features_under_another_name(tmp_path):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3]))
    with pytest.raises(FeatureFileError, match=r"S0\.h5: 'uni' is not in the file; found features"):
        MILDataset(labels_csv, features_dir, feat_type="uni")


# Which slide is meant


@pytest.mark.parametrize("cache", ["ram", "off", "packed"])
def test_a_negative_number_counts_from_the_end_in_every_table(cohort, tmp_path, cache):
    dataset = MILDataset(*cohort, cache=tmp_path if cache == "packed" else cache)
    expected = [(dataset.bag(slide).features, row.label) for slide, row in enumerate(dataset.rows)]
    count = len(dataset)
    for slide in (-2, -1, -count, 1, np.int64(3), np.int32(-3), torch.tensor(2)):
        for features, label in (dataset[slide], (dataset.features(slide), expected[int(slide)][1])):
            assert np.array_equal(features.numpy(), expected[int(slide)][0])
            assert label == expected[int(slide)][1]
        assert np.array_equal(dataset.bag(slide).features, expected[int(slide)][0])
    batch = next(dataset.batches([-1, np.int64(-2)], 8, seed=0))
    assert equal([batch], dataset.batches([count - 1, count - 2], 8, seed=0))
    assert all(np.array_equal(features.numpy(), one) for (features, _), (one, _) in zip(dataset, expected, strict=True))


def test_a_slice_is_a_list_of_slides(cohort):
    dataset = MILDataset(*cohort)
    for part in (slice(3), slice(-2, None), slice(None, None, -3), slice(5, 5)):
        expected = [dataset[slide] for slide in range(len(dataset))][part]
        assert [item[1] for item in dataset[part]] == [item[1] for item in expected]
        assert [item[0].tolist() for item in dataset[part]] == [item[0].tolist() for item in expected]


def test_a_slide_that_is_not_there_is_an_index_error(cohort):
    dataset = MILDataset(*cohort)
    ways = (dataset.__getitem__, dataset.features, dataset.bag, lambda slide: next(dataset.batches([slide], 8, 0)))
    for slide in (8, -9, np.int64(100)):
        for call in ways:
            with pytest.raises(IndexError, match=rf"no slide {slide}; there are 8"):
                call(slide)
    for slide in (1.0, "S1", None, True, np.True_, np.array(True), torch.tensor(True)):
        with pytest.raises(TypeError):
            dataset[slide]
    with pytest.raises(TypeError, match="flatnonzero"):
        next(dataset.batches(np.ones(8, dtype=bool), 8, 0))


def test_a_dataset_says_what_it_holds(cohort):
    assert repr(MILDataset(*cohort, chunk_size=50)) == (
        "MILDataset(8 slides, fed in chunks of up to 50 patches; features 4 wide; "
        "benign 4 slides of 2 patients; malignant 4 slides of 2 patients; 4 patients in all; positive: malignant)"
    )
    assert "8 slides, fed whole" in repr(MILDataset(*cohort, mode="full"))


# Batches

LENGTHS = (1, 2, 9, 10, 11, 37, 100, 205)


@pytest.fixture(scope="module")
def numbered_cohort(tmp_path_factory):
    return make(tmp_path_factory.mktemp("numbered"), numbered(LENGTHS))


@pytest.mark.parametrize("window", [1, 40, 2**18])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("settings", [{"chunk_size": 10}, {"chunk_size": 1000}, {"mode": "full", "chunk_size": 10}])
def test_an_epoch_holds_every_patch_of_every_slide_once(numbered_cohort, monkeypatch, window, batch_size, settings):
    monkeypatch.setattr(mil_dataset, "SHUFFLE_WINDOW", window)
    dataset = MILDataset(*numbered_cohort, **settings)
    slides = [0, 1, 3, 4, 5, 7]
    batches = list(dataset.batches(slides, batch_size, seed=3))
    assert sorted(patches_in(batches)) == [(slide, patch) for slide in slides for patch in range(LENGTHS[slide])]
    for batch in batches:
        assert torch.equal(batch.labels, torch.from_numpy(dataset.labels)[batch.slides])
        assert max(map(len, batch.bags)) <= (205 if settings.get("mode") == "full" else settings["chunk_size"])
    sizes = [len(batch.bags) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1]), "only the last batch may be smaller"
    assert sizes[-1] <= batch_size


@pytest.mark.parametrize(
    ("settings", "chunks"), [({"mode": "full"}, 7), ({"chunk_size": 10}, 20), ({"chunk_size": 1}, 170)]
)
def test_automatic_batches_make_at_least_eight_steps_of_at_most_128(numbered_cohort, settings, chunks, monkeypatch):
    slides = list(range(len(LENGTHS) - 1))
    dataset = MILDataset(*numbered_cohort, **settings)
    sizes = [len(batch.bags) for batch in dataset.batches(slides, "auto", seed=3)]
    assert (sum(sizes), max(sizes)) == (chunks, -(-chunks // 8))
    monkeypatch.setattr("utils.bags.chunks.MOST_IN_BATCH", 3)
    assert max(len(batch.bags) for batch in dataset.batches(slides, "auto", seed=3)) == min(3, -(-chunks // 8))


@pytest.mark.parametrize("window", [1, 40, 2**18])
@pytest.mark.parametrize("settings", [{"chunk_size": 10}, {"mode": "full"}])
def test_chunk_weights_average_1_and_weigh_slides_alike(numbered_cohort, monkeypatch, window, settings):
    monkeypatch.setattr(mil_dataset, "SHUFFLE_WINDOW", window)
    dataset = MILDataset(*numbered_cohort, **settings)
    slides = [0, 2, 5, 6, 7]
    batches = list(dataset.batches(slides, 4, seed=0))
    weights = torch.cat([batch.weights for batch in batches]).double()
    of_slide = torch.cat([batch.slides for batch in batches])
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    totals = [weights[of_slide == slide].sum().item() for slide in slides]
    assert totals == pytest.approx([len(weights) / len(slides)] * len(slides), rel=1e-5)


@pytest.mark.parametrize("window", [1, 60, 2**18])
def test_the_seed_alone_decides_the_batches(numbered_cohort, monkeypatch, window):
    monkeypatch.setattr(mil_dataset, "SHUFFLE_WINDOW", window)
    slides = list(range(len(LENGTHS)))
    one, again = (list(MILDataset(*numbered_cohort, chunk_size=10).batches(slides, 4, seed=5)) for _ in range(2))
    assert equal(one, again)
    dataset = MILDataset(*numbered_cohort, chunk_size=10)
    assert equal(one, dataset.batches(slides, 4, seed=5))
    assert equal(one, dataset.batches(np.array(slides), 4, seed=5)), "a second epoch depends on the first"
    for seed in (4, 6):
        other = list(dataset.batches(slides, 4, seed))
        assert not equal(one, other)
        assert patches_in(one) != patches_in(other)


def test_an_epoch_draws_nothing_from_the_global_generators(numbered_cohort):
    dataset = MILDataset(*numbered_cohort, chunk_size=10)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(dataset.batches([5, 6, 7], 4, seed=5))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_chunks_of_different_slides_are_shuffled_together(numbered_cohort):
    dataset = MILDataset(*numbered_cohort, chunk_size=10)
    slides = [5, 6, 7]
    order = torch.cat([batch.slides for batch in dataset.batches(slides, 4, seed=5)])
    changes = int((order.diff() != 0).sum())
    assert changes > 8, "the chunks of a slide stand together"
    orders = {tuple(torch.cat([b.slides for b in dataset.batches(slides, 4, seed)]).tolist()) for seed in range(5)}
    assert len(orders) == 5


def test_sequential_chunks_are_runs_of_neighbours(numbered_cohort):
    for seed in range(2):
        batches = MILDataset(*numbered_cohort, chunk_size=100, sequential=True).batches([7], 1, seed)
        runs = sorted([patch for _, patch in patches_in([batch])] for batch in batches)
        assert runs == [list(range(68)), list(range(68, 136)), list(range(136, 205))]


def test_each_epoch_cuts_a_slide_in_another_way(numbered_cohort):
    dataset = MILDataset(*numbered_cohort, chunk_size=100)
    cuts = set()
    for seed in range(4):
        batches = list(dataset.batches([7], 1, seed))
        cuts.add(frozenset(frozenset(patches_in([batch])) for batch in batches))
    assert len(cuts) == 4


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The slides whose files are read, in that order."""
    found = []

    def noting(files, slide):
        found.append(slide)
        return read(files, slide)

    read = FileFeatures.__call__
    monkeypatch.setattr(FileFeatures, "__call__", noting)
    return found


def test_a_small_window_reads_few_slides_at_a_time(numbered_cohort, monkeypatch, reads):
    monkeypatch.setattr(mil_dataset, "SHUFFLE_WINDOW", 1)
    dataset = MILDataset(*numbered_cohort, chunk_size=10, cache="off")
    epoch = dataset.batches(range(8), 1, seed=0)
    next(epoch)
    assert len(reads) == 1
    list(epoch)
    assert sorted(reads) == list(range(8)), "a slide is read once an epoch"


def test_the_windows_hold_other_slides_in_each_epoch(numbered_cohort, monkeypatch):
    monkeypatch.setattr(mil_dataset, "SHUFFLE_WINDOW", 1)
    dataset = MILDataset(*numbered_cohort, mode="full")
    orders = [torch.cat([batch.slides for batch in dataset.batches(range(8), 4, seed)]).tolist() for seed in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_mixed_precisions_make_one_batch(tmp_path):
    bags = numbered([4, 6])
    bags["S0"] = bags["S0"].astype("f2")
    dataset = MILDataset(*make(tmp_path, bags))
    assert dataset[0][0].dtype == torch.float16
    assert dataset[1][0].dtype == torch.float32
    (batch,) = dataset.batches([0, 1], 2, seed=0)
    assert {bag.dtype for bag in batch.bags} == {torch.float16, torch.float32}
    assert sorted(patches_in([batch])) == [(0, k) for k in range(4)] + [(1, k) for k in range(6)]


# Where the features are


@pytest.mark.parametrize("settings", [{"chunk_size": 16}, {"chunk_size": 16, "sequential": True}, {"mode": "full"}])
def test_the_cache_changes_speed_and_nothing_else(cohort, tmp_path, reads, settings):
    slides = list(range(8))
    epochs = {}
    for cache, count in {"off": 16, "ram": 8, tmp_path: 8}.items():
        reads.clear()
        dataset = MILDataset(*cohort, cache=cache, **settings)
        epochs[cache] = [batch for seed in (1, 2) for batch in dataset.batches(slides, 4, seed)]
        assert len(reads) == count
    assert equal(epochs["ram"], epochs["off"])
    assert equal(epochs[tmp_path], epochs["off"])
    reads.clear()
    again = MILDataset(*cohort, cache=tmp_path, **settings)
    assert equal(epochs["off"], [batch for seed in (1, 2) for batch in again.batches(slides, 4, seed)])
    assert reads == []


def test_an_item_may_be_changed_without_changing_the_cache(cohort, tmp_path):
    for cache in ("off", "ram", tmp_path):
        dataset = MILDataset(*cohort, cache=cache)
        kept = dataset.features(2).clone()
        dataset[2][0].zero_()
        assert torch.equal(dataset.features(2), kept)
        for batch in dataset.batches([2], 4, seed=0):
            for bag in batch.bags:
                bag.zero_()
        assert torch.equal(dataset.features(2), kept)


def test_a_cohort_is_kept_in_memory_up_to_a_share_of_what_is_free(cohort, monkeypatch, said, reads):
    total = sum(info.nbytes for info in MILDataset(*cohort, cache="off").info)
    for free, count, words in (
        (total * 4, 1, "kept in memory after the first read"),
        (None, 1, "kept in memory after the first read"),
        (total * 4 - 4, 2, "read from their files in every epoch; --cache DIR packs them into one fast file"),
    ):
        monkeypatch.setattr(cohort_features, "available_memory", lambda free=free: free)
        dataset = MILDataset(*cohort)
        reads.clear()
        assert torch.equal(dataset.features(3), dataset.features(3))
        assert len(reads) == count
        assert said().endswith(f"{words}\n")


def test_memory_that_is_asked_for_and_not_there_is_refused(cohort, monkeypatch):
    total = sum(info.nbytes for info in MILDataset(*cohort, cache="off").info)
    monkeypatch.setattr(cohort_features, "available_memory", lambda: total)
    MILDataset(*cohort, cache="ram")
    monkeypatch.setattr(cohort_features, "available_memory", lambda: total - 1)
    with pytest.raises(ConfigError, match=r"--cache ram: 8 slides, .* GB of memory free; give off or a folder"):
        MILDataset(*cohort, cache="ram")


def test_lengths_and_labels_are_learned_without_the_features(cohort, tmp_path, reads):
    for cache in ("off", "ram"):
        dataset = MILDataset(*cohort, cache=cache)
        assert len([(info.num_instances, label) for info, label in zip(dataset.info, dataset.labels, strict=True)]) == 8
    assert reads == []


# Groups


def test_a_group_column_is_kept_beside_the_cases(tmp_path):
    labels_csv, features_dir = make(tmp_path, numbered([2, 3, 4]))
    labels_csv.write_text("case_id,wsi_id,label,site\nP0,S0,a,x\nP1,S1,b,y\nP2,S2,a,x\n")
    dataset = MILDataset(labels_csv, features_dir, group_column="site")
    assert dataset.groups.tolist() == ["x", "y", "x"]
    assert dataset.cases.tolist() == MILDataset(labels_csv, features_dir).groups.tolist() == ["P0", "P1", "P2"]
    with pytest.raises(LabelsError, match="no column scanner"):
        MILDataset(labels_csv, features_dir, group_column="scanner")


# The command line's cohort


@pytest.fixture
def home(tmp_path, monkeypatch, cohort):
    """A working folder with datasets/mine as its cohort."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cohort[1], tmp_path / "datasets" / "mine" / "features")
    shutil.copy(cohort[0], tmp_path / "datasets" / "mine" / "labels.csv")
    return tmp_path


def test_of_cohort_takes_the_default_folders(home):
    dataset = MILDataset.of_cohort(Cohort(dataset="mine"))
    assert len(dataset) == 8
    assert dataset.features_dir == Path("datasets/mine/features")
    assert (dataset.mode, dataset.chunk_size, dataset.feat_type) == ("chunked", 1000, "features")
    assert dataset.largest_chunk == 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brest", r"no datasets/brest/labels\.csv; did you mean breast\?; for a cohort of your own give --labels_csv"),
        ("mien", r"did you mean mine\?"),
        ("breast", r"fetch it with python -m datasets\.download breast, or give --labels_csv"),
        ("quite_other", r"no datasets/quite_other/labels\.csv; for a cohort of your own"),
    ],
)
def test_a_cohort_that_is_not_there(home, name, message):
    with pytest.raises(ConfigError, match=message):
        MILDataset.of_cohort(Cohort(dataset=name))


def test_of_cohort_passes_every_setting_on(home, cohort):
    (home / "datasets" / "mine" / "labels.csv").unlink()
    table = home / "other.csv"
    table.write_text(cohort[0].read_text() + "P9,S9,benign\n")
    classes = ("malignant", "benign")
    given = Cohort(
        dataset="mine", labels_csv=table, features_dir=cohort[1], class_names=classes, allow=("missing",), mode="full",
        chunk_size=7, cache=str(home / "packed"), group_column="label",
    )  # fmt: skip
    dataset = MILDataset.of_cohort(given)
    assert len(dataset) == 8
    assert dataset.class_names == classes
    assert (dataset.features_dir, dataset.mode, dataset.chunk_size) == (cohort[1], "full", 7)
    assert dataset.largest_chunk is None
    with pytest.raises(FeatureFileError, match="'uni' is not in the file"):
        MILDataset.of_cohort(dataclasses.replace(given, feat_type="uni"))


def write_known(home: Path, name: str, labels: list[str]) -> None:
    labels_csv, features_dir = make(home / "made", numbered([2] * len(labels)))
    (home / "datasets").mkdir(exist_ok=True)
    features_dir.parent.rename(home / "datasets" / name)
    rows = [f"P{k},S{k},{label}" for k, label in enumerate(labels)]
    (home / "datasets" / name / labels_csv.name).write_text("\n".join(["case_id,wsi_id,label", *rows]) + "\n")


def names_of(dataset: MILDataset) -> list[str]:
    return [dataset.class_names[label] for label in dataset.labels]


@pytest.mark.parametrize(
    ("name", "labels", "classes", "read"),
    [
        ("tupac", ["1", "0", "1"], ("Low", "High"), ["High", "Low", "High"]),
        ("tupac", ["High", "0", "Low"], ("Low", "High"), ["High", "Low", "Low"]),
        ("breast", ["ILC", "IDC", "MDLC", "PD", "IDC"], ("IDC", "ILC"), ["ILC", "IDC", "IDC"]),
        ("lung", ["LUSC", "LUAD"], ("LUAD", "LUSC"), ["LUSC", "LUAD"]),
        ("kidney", ["CHRCC", "CCRCC", "PRCC"], ("PRCC", "CCRCC", "CHRCC"), ["CHRCC", "CCRCC", "PRCC"]),
    ],
)
def test_known_cohorts_bring_their_classes(tmp_path, monkeypatch, name, labels, classes, read):
    monkeypatch.chdir(tmp_path)
    write_known(tmp_path, name, labels)
    dataset = MILDataset.of_cohort(Cohort(dataset=name))
    assert dataset.class_names == classes
    assert names_of(dataset) == read


def test_a_known_cohort_with_a_label_nobody_knows_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_known(tmp_path, "breast", ["IDC", "ILC", "mdlc"])
    with pytest.raises(LabelsError, match=r"none of IDC, ILC: S2 \('mdlc'\)"):
        MILDataset.of_cohort(Cohort(dataset="breast"))


def test_classes_that_are_given_hold_for_a_known_cohort_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_known(tmp_path, "tupac", ["1", "0", "1"])
    for classes, read in ((("High", "Low"), ["High", "Low", "High"]), (("0", "1"), ["1", "0", "1"])):
        dataset = MILDataset.of_cohort(Cohort(dataset="tupac", class_names=classes))
        assert dataset.class_names == classes
        assert names_of(dataset) == read
    write_known(tmp_path, "breast", ["IDC", "ILC", "MDLC"])
    given = Cohort(dataset="breast", class_names=("IDC", "MDLC"))
    with pytest.raises(LabelsError, match=r"none of IDC, MDLC: S1 \('ILC'\)"):
        MILDataset.of_cohort(given)
    assert names_of(MILDataset.of_cohort(dataclasses.replace(given, allow=("unknown",)))) == ["IDC", "MDLC"]


# The helper that other tests build on


def test_the_synthetic_cohort_is_the_same_each_time_and_can_be_learned(tmp_path):
    settings = {"patients_per_class": 3, "classes": ("a", "b", "c"), "dim": 8, "patches": (5, 9)}
    one, other = (write_cohort(tmp_path / name, **settings) for name in ("one", "other"))
    assert one[0].read_bytes() == other[0].read_bytes()
    names = sorted(path.name for path in one[1].iterdir())
    assert len(names) == 18
    for name in names:
        assert (one[1] / name).read_bytes() == (other[1] / name).read_bytes()
    another = write_cohort(tmp_path / "another", **settings, seed=1)
    assert (another[1] / names[0]).read_bytes() != (one[1] / names[0]).read_bytes()
    dataset = MILDataset(*write_cohort(tmp_path / "large", patches=(80, 100), signal=6.0))
    means = np.stack([dataset.features(slide)[:, :2].float().mean(dim=0) for slide in range(len(dataset))])
    assert (means.argmax(axis=1) == dataset.labels).all()
    assert all(len(set(dataset.labels[dataset.cases == case])) == 1 for case in dataset.cases)
    bag = synthetic_bag("x", np.ones((30, 2), "f2"), np.random.default_rng(0))
    assert bag.coords is not None
    assert len(np.unique(bag.coords, axis=0)) == 30


# Real bags


def test_a_stamp_like_bag_is_a_slide(shared_data, tmp_path):
    (stored,) = (shared_data / "bags").glob("mopadi_*.h5")
    for wsi_id in ("a", "b"):
        shutil.copyfile(stored, tmp_path / f"{wsi_id}.h5")
    (tmp_path / "labels.csv").write_text("case_id,wsi_id,label\nP1,a,x\nP2,b,y\n")
    dataset = MILDataset(tmp_path / "labels.csv", tmp_path)
    assert dataset[0][0].shape == (777, 512)
    assert sum(len(bag) for batch in dataset.batches([0], 1, seed=0) for bag in batch.bags) == 777
