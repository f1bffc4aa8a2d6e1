import math
import pickle
from dataclasses import replace

import pytest
import torch

from tests.prediction.checkpoint_helpers import check_damage, check_refused
from utils.core.errors import CheckpointError
from utils.core.files import digest
from utils.core.recipe import Recipe
from utils.core.tensor_files import load_tensors, save_tensors
from utils.prediction.checkpoint import FORMAT, VERSION, Checkpoint, id_digests, load_checkpoint, save_checkpoint
from utils.prediction.forward_pass import SlideFeed

SLIDES, CASES = ["TCGA-A2-0001-01Z", "TCGA-A2-0002-01Z"], ["Mrs Example", "Mr Example"]


@pytest.fixture
def checkpoint(make_model) -> Checkpoint:
    torch.manual_seed(0)
    model = make_model()
    return Checkpoint(
        model=model.spec,
        state_dict=model.state_dict(),
        class_names=("benign", "malignant"),
        dataset="demo",
        feed=SlideFeed(20, "mean").as_dict(),
        recipe=Recipe(backbone="resnet50", transform={"mean": [0.5, 0.5, 0.5]}, patch_size=256),
        mpp_range=(0.49, 0.51),
        selection={"monitor": "slide_auc", "val_auc": 0.9, "val_loss": None},
        seen={"slide": id_digests("slide", SLIDES), "case": id_digests("case", CASES)},
    )


@pytest.fixture
def saved(checkpoint, tmp_path):
    save_checkpoint(tmp_path / "fold_1_best.pth", checkpoint)
    return tmp_path / "fold_1_best.pth"


def rewritten(path, **changes):
    """The file at `path` with some of its parts changed; a part given as None is left out."""
    content = load_tensors(path, CheckpointError, "a checkpoint") | changes
    save_tensors(path, {name: part for name, part in content.items() if part is not None})
    return path


def test_round_trip(checkpoint, saved):
    loaded = load_checkpoint(saved)
    for name in ("model", "class_names", "dataset", "feed", "recipe", "mpp_range", "selection", "seen", "versions"):
        assert getattr(loaded, name) == getattr(checkpoint, name), name
    assert loaded.slide_feed == SlideFeed(20, "mean")
    assert {"litemil", "python", "torch"} <= loaded.versions.keys()
    model, x = loaded.build(), torch.randn(1, 5, 16)
    assert not model.training
    assert model.spec == checkpoint.model
    assert torch.equal(model(x)[0], checkpoint.build()(x)[0])
    assert all(torch.equal(model.state_dict()[name], part) for name, part in checkpoint.state_dict.items())


def test_loaded_twice_gives_two_models(saved):
    loaded = load_checkpoint(saved)
    one, other = loaded.build(), loaded.build()
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}


def test_equal_content_is_equal_bytes_whatever_the_name(checkpoint, saved, tmp_path):
    save_checkpoint(tmp_path / "another" / "a much longer name.pth", checkpoint)
    save_checkpoint(tmp_path / "again.pth", load_checkpoint(saved))
    expected = saved.read_bytes()
    assert (tmp_path / "another" / "a much longer name.pth").read_bytes() == expected
    assert (tmp_path / "again.pth").read_bytes() == expected
    save_checkpoint(tmp_path / "other.pth", replace(checkpoint, dataset="other"))
    assert (tmp_path / "other.pth").read_bytes() != expected


def test_loads_with_weights_only_and_plain_values(saved):
    content = torch.load(saved, weights_only=True)

    def plain(part):
        if isinstance(part, dict):
            return all(isinstance(name, str) and plain(item) for name, item in part.items())
        if isinstance(part, list | tuple):
            return all(plain(item) for item in part)
        return part is None or type(part) in (str, int, float, bool, torch.Tensor)

    assert plain(content)
    assert (content["format"], content["format_version"]) == (FORMAT, VERSION)


def test_no_id_is_in_the_file(saved):
    content = saved.read_bytes()
    for name in SLIDES + CASES:
        assert name.encode() not in content
        assert name.split("-")[-1].split(" ")[-1].encode() not in content


def test_a_temperature_is_kept_and_earlier_files_have_none(checkpoint, saved, tmp_path):
    save_checkpoint(tmp_path / "scaled.pth", replace(checkpoint, temperature=1.5))
    assert load_checkpoint(tmp_path / "scaled.pth").temperature == 1.5
    content = torch.load(saved, weights_only=True)
    assert content.pop("temperature") is None
    save_tensors(tmp_path / "earlier.pth", content)
    assert load_checkpoint(tmp_path / "earlier.pth").temperature is None
    for wrong in (0.0, -1.0, float("nan"), "warm"):
        save_tensors(tmp_path / "wrong.pth", content | {"temperature": wrong})
        check_refused(tmp_path / "wrong.pth", "temperature")


def test_a_checkpoint_can_be_calibrated_for_another_share_of_positive_slides(checkpoint, tmp_path):
    scaled = replace(checkpoint, temperature=1.5, intercepts=(0.7, -0.7), prior=(0.8, 0.2))
    save_checkpoint(tmp_path / "scaled.pth", scaled)
    assert load_checkpoint(tmp_path / "scaled.pth").fitted == scaled.fitted
    even = scaled.at_prevalence(0.5)
    assert even.prior == (0.5, 0.5)
    assert even.intercepts == pytest.approx((0.7 - math.log(2), -0.7 + math.log(2)))
    assert scaled.at_prevalence(0.2).intercepts == pytest.approx(scaled.intercepts)
    with pytest.raises(ValueError, match="no frequencies"):
        replace(scaled, intercepts=None, prior=None).at_prevalence(0.5)


def test_digests_tell_what_was_seen():
    assert id_digests("slide", ["a", "b", "a"]) == sorted(
        [digest("litemil", "slide", "a"), digest("litemil", "slide", "b")]
    )
    assert not set(id_digests("slide", ["a"])) & set(id_digests("case", ["a"]))


def test_a_missing_file(tmp_path):
    check_refused(tmp_path / "none.pth", "no such file; expected a checkpoint written by train.py")
    check_refused(tmp_path, "no such file")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_a_foreign_file(content, tmp_path):
    (tmp_path / "foreign.pth").write_bytes(content)
    check_refused(tmp_path / "foreign.pth", "not loadable as a checkpoint written by train.py")


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_a_truncated_file(keep, saved):
    saved.write_bytes(saved.read_bytes()[: int(keep * saved.stat().st_size)])
    check_refused(saved, "not loadable")


@pytest.mark.filterwarnings("ignore")  # PyTorch wonders about pickles it did not write
def test_damage_is_a_clear_error_or_harmless(saved):
    check_damage(saved)


@pytest.mark.filterwarnings("ignore")
def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"format": FORMAT, "evil": Evil()}, tmp_path / "evil.pth")
    check_refused(tmp_path / "evil.pth", "neither tensor, array nor plain value")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    check_refused(tmp_path / "evil.pkl", "not loadable")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [{"model_state_dict": {}}, {"format": "other"}, [1, 2], torch.zeros(3)])
def test_another_programs_tensors(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    check_refused(tmp_path / "other.pth", "not a LiteMIL checkpoint; give a fold_<k>_best.pth")


def test_a_newer_format_is_named(saved):
    check_refused(rewritten(saved, format_version=VERSION + 1), f"format {VERSION + 1}, this LiteMIL reads {VERSION}")


def test_a_format_without_a_version(saved):
    check_refused(rewritten(saved, format_version=None), f"format None, this LiteMIL reads {VERSION}")


@pytest.mark.parametrize("part", ["model", "state_dict", "class_names", "feed", "seen", "selection"])
def test_a_part_that_is_missing(part, saved):
    check_refused(rewritten(saved, **{part: None}), f"parts do not fit together.*{part}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "LiteMIL", "input_dim": 17, "num_classes": 2, "hidden_dim": 16}}, "size mismatch"),
        ({"model": {"name": "meanPool", "input_dim": 16, "num_classes": 2, "hidden_dim": 16}}, "Missing key"),
        ({"model": {"name": "Nobody", "input_dim": 16, "num_classes": 2}}, "unknown model 'Nobody'"),
        ({"model": {"name": "LiteMIL", "input_dim": 16, "num_classes": 2, "heads": 3}}, "heads"),
        ({"model": {"name": "LiteMIL"}}, "input_dim"),
        ({"model": [1]}, "mapping"),
        ({"state_dict": {}}, "Missing key"),
        ({"state_dict": [1]}, "dict"),
        ({"class_names": ("benign",)}, "a classifier needs two different ones"),
        ({"class_names": ("a", "b", "c")}, "3 class names for a model of 2 outputs"),
        ({"feed": {"mode": "full"}}, "chunk_size"),
    ],
)
def test_parts_that_do_not_fit(changes, message, saved):
    check_refused(rewritten(saved, **changes), f"parts do not fit together.*{message}")
