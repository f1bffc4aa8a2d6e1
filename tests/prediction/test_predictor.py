import numpy as np
import pytest
import torch

from MILS import build_mil
from MILS.ensemble import Ensemble
from MILS.LiteMIL import LiteMIL
from tests.bags import writers
from tests.conftest import BACKBONE, PATCH
from tests.reference_litemil import KIDNEY, ReferenceLiteMIL, write_all_folds, write_fold
from tests.small import TASK
from utils.bags.store import Bag, write_bag
from utils.core.errors import CheckpointError, ConfigError, FeatureFileError, RecipeError
from utils.core.passport import Passport
from utils.core.recipe import Recipe
from utils.prediction.checkpoint import Checkpoint, id_digests, save_checkpoint
from utils.prediction.forward_pass import SlideFeed, predict_features
from utils.prediction.predictor import SlidePredictor, extractPredict
from utils.slides.open_slides import open_slide

RECIPE = {
    "backbone": "uni", "weights_digest": "a" * 64, "transform": {"resize": 224}, "precision": "float32",
    "dtype": "float16", "patch_size": 256, "stride": 256, "level": 0, "tissue_threshold": 0.5,
}  # fmt: skip

CHUNKS_OF_20 = SlideFeed(20, "mean")


def make_checkpoint(path, mil="LiteMIL", feed=CHUNKS_OF_20, recipe=RECIPE, mpp_range=(0.25, 0.25)):
    torch.manual_seed(0)
    model = build_mil(mil, input_dim=16, num_classes=2)
    seen = {"slide": id_digests("slide", ["trained"]), "case": id_digests("case", ["P1"])}
    names = ("benign", "malignant")
    save_checkpoint(
        path,
        Checkpoint(
            model.spec,
            model.state_dict(),
            names,
            "demo",
            feed.as_dict(),
            recipe and Recipe.from_dict(recipe),
            mpp_range,
            {},
            seen,
        ),
    )
    return model.eval()


def make_bag(n=50, dim=16, mpp=0.25, **recipe):
    rng = np.random.default_rng(n)
    passport = Passport(Recipe.from_dict(RECIPE | recipe), {"mpp_delivered": mpp, "patch_size_level0": 256})
    return Bag(rng.standard_normal((n, dim)).astype(np.float16), np.zeros((n, 2), np.int64), 256, passport)


@pytest.fixture
def checkpoint(tmp_path):
    make_checkpoint(tmp_path / "model.pth")
    return tmp_path / "model.pth"


def bag_file(tmp_path, bag, name="slide.h5"):
    write_bag(tmp_path / name, bag)
    return tmp_path / name


@pytest.mark.parametrize("mil", ["LiteMIL", "ABMIL", "ABMIL_Multihead", "meanPool", "maxPool", "TransMIL"])
def test_full_mode_is_the_model_on_the_whole_slide(mil, tmp_path):
    model = make_checkpoint(tmp_path / "model.pth", mil)
    bag = make_bag(50)
    answer = SlidePredictor(tmp_path / "model.pth", device="cpu").predict(bag_file(tmp_path, bag), mode="full")
    with torch.inference_mode():
        logits, aux = model(torch.from_numpy(bag.features).float()[None])
    np.testing.assert_allclose(answer.probabilities, torch.softmax(logits[0], 0), atol=1e-6)
    np.testing.assert_allclose(answer.attention, aux["attn"][0], atol=1e-6)


def test_chunked_by_default_as_evaluated_and_attention_sums_to_one(checkpoint, tmp_path):
    predictor = SlidePredictor(checkpoint, device="cpu")
    path = bag_file(tmp_path, make_bag(50))
    chunked = predictor.predict(path)
    assert chunked.feed == SlideFeed(20, "mean")
    np.testing.assert_allclose(chunked.attention.sum(axis=1), 1, atol=1e-5)
    assert predictor.predict(path, chunk_size=10).feed == SlideFeed(10, "mean")
    assert predictor.predict(path, mode="full").feed == SlideFeed(None, "merge")
    assert predictor.predict(path, mode="full", chunk_size=1000).feed == SlideFeed(None, "merge")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "whole"}, "--mode 'whole': expected one of full, chunked"),
        ({"chunk_size": -5}, "--chunk_size -5: out of range; give a number at least 1"),
        ({"chunk_size": 0}, "--chunk_size 0: out of range"),
        ({"chunk_size": "10"}, "--chunk_size '10': expected a whole number"),
        ({"feat_type": 3}, "--feat_type 3: expected text"),
    ],
)
def test_ways_of_feeding_that_cannot_be(checkpoint, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        SlidePredictor(checkpoint, device="cpu").predict(bag_file(tmp_path, make_bag(50)), **settings)


@pytest.mark.parametrize("model_path", [None, 3, [None]])
def test_a_predictor_of_no_checkpoint(model_path):
    with pytest.raises(ConfigError, match=r"--checkpoint .*: expected a list of paths"):
        SlidePredictor(model_path, device="cpu")


def test_class_names_that_are_a_set(checkpoint):
    with pytest.raises(ConfigError, match=r"--class_names .*: expected a list of text, whose order counts"):
        SlidePredictor(checkpoint, class_names={"a", "b"}, device="cpu")


def test_the_answer_as_a_dict(checkpoint, tmp_path):
    answer = SlidePredictor(checkpoint, device="cpu").predict(bag_file(tmp_path, make_bag(30))).as_dict()
    assert answer["num_instances"] == 30
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["predicted_class"] == max(answer["probabilities"], key=answer["probabilities"].get)
    assert answer["confidence"] == max(answer["probabilities"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "phikon-v2"}, "backbone: found phikon-v2, expected uni"),
        ({"weights_digest": "b" * 64}, "weights_digest: found bbbbbbbbbbbb, expected aaaaaaaaaaaa"),
        ({"transform": {"resize": 256}}, "transform.resize: found 256, expected 224"),
        ({"patch_size": 512}, "patch_size: found 512, expected 256"),
        ({"mpp": 0.5}, "mpp: found 0.5 um/px, expected 0.25 to 0.25"),
    ],
)
def test_features_made_in_another_way_are_refused(change, message, checkpoint, tmp_path, caplog):
    path = bag_file(tmp_path, make_bag(**change))
    with pytest.raises(RecipeError, match=message):
        SlidePredictor(checkpoint, device="cpu").predict(path)
    SlidePredictor(checkpoint, device="cpu", allow_mismatch=True).predict(path)
    assert message in caplog.text


def test_what_is_not_known_is_said_once(checkpoint, tmp_path, caplog):
    predictor = SlidePredictor(checkpoint, device="cpu")
    bare = Bag(make_bag().features)
    for name in ("a.h5", "b.pt"):
        predictor.predict(bag_file(tmp_path, bare, name))
    assert caplog.text.count("not compared with the training") == 1


def test_a_stride_or_threshold_of_its_own_is_no_mismatch(checkpoint, tmp_path):
    SlidePredictor(checkpoint, device="cpu").predict(bag_file(tmp_path, make_bag(stride=128, tissue_threshold=0.1)))


def test_seen_in_training(checkpoint, tmp_path):
    predictor = SlidePredictor(checkpoint, device="cpu")
    assert predictor.predict(bag_file(tmp_path, make_bag(), "trained.h5")).seen_in_training is True
    assert predictor.predict(bag_file(tmp_path, make_bag(), "other.h5")).seen_in_training is False


def test_arguments_are_checked_against_the_checkpoint(checkpoint):
    for right in ("LiteMIL", LiteMIL, lambda: build_mil("LiteMIL", input_dim=4, num_classes=2)):
        SlidePredictor(checkpoint, right, ["benign", "malignant"], "cpu")
    SlidePredictor(checkpoint, device="cpu", dataset="demo", num_heads=4)
    for wrong in (
        {"model_class": "ABMIL"}, {"class_names": ["malignant", "benign"]}, {"dataset": "lung"}, {"num_heads": 8},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="leave that setting out"):
            SlidePredictor(checkpoint, device="cpu", **wrong)


def test_heads_asked_of_a_model_without_any(tmp_path):
    make_checkpoint(tmp_path / "model.pth", "meanPool")
    with pytest.raises(CheckpointError, match="records no num_heads, so not 4; leave that setting out"):
        SlidePredictor(tmp_path / "model.pth", device="cpu", num_heads=4)


def test_input_that_cannot_be_predicted(checkpoint, tmp_path):
    predictor = SlidePredictor(checkpoint, device="cpu")
    with pytest.raises(FeatureFileError, match="features are 8 wide"):
        predictor.predict(bag_file(tmp_path, make_bag(dim=8)))
    with pytest.raises(FeatureFileError, match="no such file"):
        predictor.predict(tmp_path / "missing.h5")
    (tmp_path / "slide.svs").touch()
    with pytest.raises(ConfigError, match="needs a feature extractor"):
        predictor.predict(tmp_path / "slide.svs")


def test_a_recipe_that_contradicts_the_recorded_one_is_refused_before_loading_a_backbone(checkpoint):
    with pytest.raises(RecipeError, match="patch_size: found 512, expected 256"):
        extractPredict(checkpoint, patch_size=512, device="cpu")
    with pytest.raises(RecipeError, match="backbone: found resnet50, expected uni"):
        extractPredict(checkpoint, backbone="resnet50", device="cpu")


@pytest.fixture
def first_version(tmp_path):
    """Write a random model of the first version, 16 features and 3 classes, and return it with its file."""

    def make(num_heads=4, num_queries=1, write=write_fold):
        torch.manual_seed(num_heads + num_queries)
        reference = ReferenceLiteMIL(16, 32, 3, num_heads, num_queries).eval()
        names = (KIDNEY,) if write is write_all_folds else ()
        return reference, write(tmp_path / "first.pth", reference, *names)

    return make


def expected_of(reference, bag):
    with torch.inference_mode():
        logits, attention = reference(torch.from_numpy(bag.features).float())
    return torch.softmax(logits, 0).numpy(), attention.numpy()


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize(("num_heads", "given"), [(4, None), (4, 4), (8, 8)])
@pytest.mark.parametrize(("write", "said"), [(write_fold, {"dataset": "kidney"}), (write_all_folds, {})])
def test_the_first_versions_models_predict_what_they_did(
    write, said, num_heads, given, num_queries, first_version, tmp_path
):
    reference, path = first_version(num_heads, num_queries, write)
    bag = make_bag(5000)  # more than one block
    answer = SlidePredictor(path, device="cpu", num_heads=given, **said).predict(bag_file(tmp_path, bag))
    probabilities, attention = expected_of(reference, bag)
    assert answer.class_names == KIDNEY
    np.testing.assert_allclose(answer.probabilities, probabilities, rtol=1e-5)
    np.testing.assert_allclose(answer.patch_attention, attention, rtol=1e-4)
    assert answer.feed == SlideFeed(None, "merge")
    assert answer.as_dict()["seen_in_training"] is None


@pytest.mark.parametrize(("num_heads", "given"), [(8, None), (4, 8)])
def test_the_wrong_number_of_heads_gives_other_numbers(num_heads, given, first_version, tmp_path):
    reference, path = first_version(num_heads)
    bag = make_bag(50)
    answer = SlidePredictor(path, device="cpu", dataset="kidney", num_heads=given).predict(bag_file(tmp_path, bag))
    assert abs(answer.probabilities - expected_of(reference, bag)[0]).max() > 1e-3


def test_arguments_as_the_first_version_took_them(first_version, tmp_path):
    """A factory, which may tell the heads, and the classes' names, by position."""
    reference, path = first_version(num_heads=8)
    bag = make_bag(50)

    def factory():
        return LiteMIL(input_dim=16, hidden_dim=32, num_classes=3, dropout=0.25, num_heads=8, num_queries=1)

    names = ["x", "y", "z"]
    for predictor in (
        SlidePredictor(path, factory, names, "cpu"),
        SlidePredictor(path, LiteMIL, names, "cpu", num_heads=8),
        SlidePredictor(path, lambda: LiteMIL(16, 3), names, "cpu", num_heads=8),
    ):
        answer = predictor.predict(bag_file(tmp_path, bag))
        assert answer.class_names == ("x", "y", "z")
        np.testing.assert_allclose(answer.probabilities, expected_of(reference, bag)[0], rtol=1e-5)
    with pytest.raises(CheckpointError, match="was trained with model_class 'LiteMIL', not 'ABMIL'"):
        SlidePredictor(path, "ABMIL", names, "cpu")
    with pytest.raises(CheckpointError, match="what its 3 classes are called"):
        SlidePredictor(path, factory, device="cpu")


def test_a_raw_slides_predictor_for_a_model_of_the_first_version(first_version, slide_cohort):
    _, path = first_version(num_heads=8)
    recipe = {"backbone": BACKBONE, "weights": slide_cohort.weights, "patch_size": PATCH, "device": "cpu"}
    predictor = extractPredict(path, dataset="kidney", num_heads=8, **recipe)
    assert predictor.checkpoint.model["num_heads"] == 8
    assert predictor.checkpoint.class_names == KIDNEY
    assert predictor.feature_extractor is not None
    assert extractPredict(path, "LiteMIL", list(KIDNEY), **recipe).checkpoint.class_names == KIDNEY


PARTIAL = {"backbone": BACKBONE, "patch_size": PATCH}


def test_a_recipe_that_other_toolkits_recorded_in_part_is_completed_by_flags(slide_cohort, tmp_path):
    make_checkpoint(tmp_path / "model.pth", recipe=PARTIAL, mpp_range=None)
    predictor = extractPredict(tmp_path / "model.pth", level=1, weights=slide_cohort.weights, device="cpu")
    assert predictor.feature_extractor is not None
    made = predictor.feature_extractor.recipe
    assert {name: made[name] for name in ("backbone", "patch_size", "stride", "level")} == PARTIAL | {
        "stride": PATCH, "level": 1,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"does not say level; give it \(--level\)"):
        extractPredict(tmp_path / "model.pth", weights=slide_cohort.weights, device="cpu")
    with pytest.raises(RecipeError, match="patch_size: found 32, expected 64"):
        extractPredict(tmp_path / "model.pth", patch_size=32, level=1, weights=slide_cohort.weights, device="cpu")


def test_the_slide_places_patches_that_are_stored_in_micrometers(checkpoint, slide_cohort, tmp_path):
    features, coords = writers.arrays(dim=16)
    path = writers.stamp(tmp_path, features, coords)
    slide = next((slide_cohort.slides).glob("*.tif"))  # 0.5 um/px, the file's slide had 0.25
    predictor = SlidePredictor(checkpoint, device="cpu")
    assert predictor.bag(path).coords is None
    np.testing.assert_array_equal(predictor.bag(path, slide=slide).coords, coords // 2)


def test_an_ensemble_tells_what_each_of_its_models_says(tmp_path):
    torch.manual_seed(0)
    members = [build_mil("LiteMIL", input_dim=16, num_classes=2).eval() for _ in range(3)]
    save_checkpoint(
        tmp_path / "ensemble.pth",
        Checkpoint(
            members[0].spec, Ensemble(members).state_dict(), ("benign", "malignant"), "demo", CHUNKS_OF_20.as_dict(),
            Recipe.from_dict(RECIPE), (0.25, 0.25), {}, {"slide": [], "case": []},
        ),
    )  # fmt: skip
    path = bag_file(tmp_path, make_bag(50))
    answer = SlidePredictor(tmp_path / "ensemble.pth", device="cpu").predict(path)
    features = torch.from_numpy(make_bag(50).features)
    each = np.stack([predict_features(TASK, model, features, CHUNKS_OF_20).probabilities for model in members])
    np.testing.assert_allclose(answer.member_probabilities, each)
    np.testing.assert_allclose(answer.probabilities, each.mean(axis=0))
    said = answer.as_dict()
    assert [one["malignant"] for one in said["member_probabilities"]] == pytest.approx(each[:, 1].tolist())
    assert said["spread"]["benign"] == pytest.approx(each[:, 0].std(ddof=1))


def test_a_single_model_has_no_spread(checkpoint, tmp_path):
    answer = SlidePredictor(checkpoint, device="cpu").predict(bag_file(tmp_path, make_bag(50)))
    assert answer.member_probabilities is None
    assert not {"member_probabilities", "spread"} & answer.as_dict().keys()


def test_a_raw_slide_at_another_resolution_is_refused_before_a_patch_is_read(slide_cohort, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "model.pth", recipe=PARTIAL | {"level": 1}, mpp_range=(0.25, 0.25))
    predictor = extractPredict(tmp_path / "model.pth", weights=slide_cohort.weights, device="cpu")
    monkeypatch.setattr(predictor.feature_extractor, "extract", None)
    slide = next(slide_cohort.slides.glob("*.tif"))
    with pytest.raises(RecipeError, match=r"mpp: found 1 um/px, expected 0.25 to 0.25"):
        predictor.predict(slide)
    with pytest.raises(RecipeError, match=r"mpp: found 1 um/px"), open_slide(slide) as raw:
        predictor.keep_features(raw, tmp_path)
