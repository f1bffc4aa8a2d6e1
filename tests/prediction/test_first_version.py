"""Checkpoints of the first version are read: in today's terms, with what they do not say said by the user."""

import numpy as np
import pytest
import torch

from tests.prediction.checkpoint_helpers import check_damage, check_refused
from tests.reference_litemil import KIDNEY, ReferenceLiteMIL, write_all_folds, write_fold
from utils.prediction.checkpoint import load_checkpoint, save_checkpoint
from utils.prediction.forward_pass import SlideFeed


@pytest.fixture
def reference() -> ReferenceLiteMIL:
    """24 features, 16 wide, 3 queries, 3 classes."""
    torch.manual_seed(0)
    return ReferenceLiteMIL(24, 16, 3, 4, 3).eval()


@pytest.fixture
def fold(reference, tmp_path):
    return write_fold(tmp_path / "fold_2_best.pth", reference)


@pytest.fixture
def all_folds(reference, tmp_path):
    return write_all_folds(tmp_path / "all_folds_best.pth", reference, KIDNEY)


def changed(path, reference, change):
    """A bare file whose state dict `change` was done to."""
    weights = dict(reference.state_dict())
    change(weights)
    torch.save(weights, path)
    return path


def test_the_sizes_are_read_off_the_tensors(fold, all_folds, caplog):
    for loaded in (load_checkpoint(fold, dataset="kidney"), load_checkpoint(all_folds)):
        assert loaded.model == {
            "name": "LiteMIL", "input_dim": 24, "num_classes": 3, "hidden_dim": 16, "num_queries": 3, "num_heads": 4,
        }  # fmt: skip
        assert loaded.class_names == KIDNEY
        assert loaded.slide_feed == SlideFeed(None, "merge")
        assert (loaded.recipe, loaded.mpp_range, loaded.versions) == (None, None, {})
        assert loaded.seen == {"case": [], "slide": []}
    assert load_checkpoint(fold, dataset="kidney").dataset == "kidney"
    assert load_checkpoint(all_folds).dataset is None
    sizes = "24 features, hidden_dim 16, num_queries 3 and 3 classes, with num_heads 4 assumed"
    assert f"{fold}: a checkpoint of the first version; by its tensors a LiteMIL of {sizes}" in caplog.text
    caplog.clear()
    load_checkpoint(all_folds, num_heads=8)
    assert "with num_heads 8 as given" in caplog.text


def test_how_it_was_chosen_is_said(fold, all_folds, caplog):
    selection = load_checkpoint(fold, dataset="kidney").selection
    assert selection.keys() == {"chosen_by", "chosen_on"}
    assert "not recorded" in selection["chosen_on"]
    assert "optimistic" not in caplog.text
    selection = load_checkpoint(all_folds).selection
    assert selection == {
        "chosen_by": "the first version of LiteMIL",
        "chosen_on": "outer test folds",
        "monitor": "slide_accuracy",
        "slide_accuracy": 0.9375,
    }
    assert type(selection["slide_accuracy"]) is float  # NumPy's would not go into JSON
    assert caplog.text.count("accuracy reported with it (0.9375) is optimistic") == 1


@pytest.mark.parametrize("accuracy", [1, 0.5, np.float64(0.5), np.float32(0.5), float("nan"), "0.5", 10**400, None])
def test_whatever_the_accuracy_it_is_a_plain_one_or_none(accuracy, reference, tmp_path):
    path = write_all_folds(tmp_path / "all_folds_best.pth", reference, KIDNEY, accuracy)
    found = load_checkpoint(path).selection["slide_accuracy"]
    assert found == (0.5 if isinstance(accuracy, float | np.floating) and accuracy == 0.5 else None)


def test_written_again_it_is_a_checkpoint_of_today(all_folds, tmp_path, caplog):
    first = load_checkpoint(all_folds)
    save_checkpoint(tmp_path / "today.pth", first)
    caplog.clear()
    again = load_checkpoint(tmp_path / "today.pth")
    assert not caplog.text
    assert (again.model, again.class_names, again.selection) == (first.model, first.class_names, first.selection)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast(dtype, reference, tmp_path):
    weights = {name: part.to(dtype) for name, part in reference.state_dict().items()}
    torch.save(weights, tmp_path / "fold_1_best.pth")
    model = load_checkpoint(tmp_path / "fold_1_best.pth", dataset="kidney").build()
    for name, part in model.state_dict().items():
        assert torch.equal(part, weights[name].float()), name


def test_the_class_names_come_from_whoever_has_them(fold, all_folds, reference, tmp_path):
    own = ("a", "b", "c")
    assert load_checkpoint(fold, class_names=own).class_names == own
    assert load_checkpoint(fold, class_names=list(KIDNEY), dataset="kidney").class_names == KIDNEY
    assert load_checkpoint(fold, class_names=own, dataset="mine").class_names == own
    assert load_checkpoint(all_folds, class_names=KIDNEY, dataset="kidney").class_names == KIDNEY
    named = write_all_folds(tmp_path / "own.pth", reference, own)
    assert load_checkpoint(named).class_names == own
    assert load_checkpoint(named, dataset="mine").dataset == "mine"
    without = tmp_path / "without.pth"
    torch.save({"model_state_dict": reference.state_dict()}, without)
    assert load_checkpoint(without, dataset="kidney").class_names == KIDNEY


def test_class_names_that_contradict_each_other(fold, all_folds, reference, tmp_path):
    named = write_all_folds(tmp_path / "own.pth", reference, ("a", "b", "c"))
    by_dataset = "classes are a, b, c by the file, PRCC, CCRCC, CHRCC by --dataset kidney; leave out"
    check_refused(named, by_dataset, dataset="kidney")
    turned = ("CHRCC", "CCRCC", "PRCC")
    check_refused(all_folds, "CHRCC, CCRCC, PRCC by class_names; leave out", class_names=turned)
    check_refused(fold, "by --dataset kidney, CHRCC, CCRCC, PRCC by class_names", dataset="kidney", class_names=turned)


def test_no_class_names(fold, tmp_path):
    message = "what its 3 classes are called; give --dataset kidney or SlidePredictor's class_names"
    check_refused(fold, message)
    check_refused(fold, message, dataset="mine")
    two = write_fold(tmp_path / "two.pth", ReferenceLiteMIL(24, 16, 2, 4, 1))
    check_refused(two, "give --dataset breast or --dataset lung or --dataset tupac or SlidePredictor's class_names")
    five = write_fold(tmp_path / "five.pth", ReferenceLiteMIL(24, 16, 5, 4, 1))
    check_refused(five, "what its 5 classes are called; give SlidePredictor's class_names")


def test_class_names_that_are_too_many_or_too_few(fold, reference, tmp_path):
    check_refused(fold, r"has 3 classes, --dataset lung names 2 \(LUAD, LUSC\); give --dataset kidney", dataset="lung")
    check_refused(fold, "has 3 classes, class_names names 4", class_names=list("abcd"))
    check_refused(write_all_folds(tmp_path / "bad.pth", reference, ("a", "b")), "has 3 classes, the file names 2")


def test_heads_that_do_not_divide_the_width(fold):
    for heads in (3, 32, 0, -4):
        check_refused(
            fold, f"{heads} attention heads do not divide its width of 16.*--num_heads", dataset="kidney",
            num_heads=heads,
        )  # fmt: skip


def test_a_width_that_the_assumed_heads_do_not_divide(tmp_path):
    path = write_fold(tmp_path / "fold_1_best.pth", ReferenceLiteMIL(24, 18, 2, 6, 1))
    check_refused(path, "4 attention heads do not divide its width of 18.*--num_heads", dataset="lung")
    assert load_checkpoint(path, dataset="lung", num_heads=6).model["num_heads"] == 6


@pytest.mark.parametrize("name", ReferenceLiteMIL(24, 16, 3, 4, 3).state_dict())
def test_a_tensor_that_is_missing_or_of_another_shape_or_kind(name, reference, tmp_path):
    path = tmp_path / "fold_1_best.pth"
    said = {"dataset": "kidney"}
    check_refused(changed(path, reference, lambda w: w.pop(name)), f"do not fit together.*{name}", **said)
    check_refused(changed(path, reference, lambda w: w.update({name: w[name][None]})), f"fit together.*{name}", **said)
    check_refused(changed(path, reference, lambda w: w.update({name: 3})), f"fit together.*{name}", **said)
    if reference.state_dict()[name].dim() == 2 and name != "stream.attn.out_proj.weight":
        check_refused(changed(path, reference, lambda w: w.update({name: w[name].T})), f"fit together.*{name}", **said)


def test_a_tensor_too_many(reference, tmp_path):
    path = changed(tmp_path / "fold_1_best.pth", reference, lambda w: w.update({"stream.gate.weight": torch.ones(3)}))
    check_refused(path, "fit together.*stream.gate.weight", dataset="kidney")


@pytest.mark.parametrize(
    "config", [None, [1], {"class_names": "abc"}, {"class_names": [1, 2, 3]}, {"class_names": {"a": 1}}]
)
def test_a_damaged_model_config(config, reference, tmp_path):
    torch.save({"model_state_dict": reference.state_dict(), "model_config": config}, tmp_path / "bad.pth")
    check_refused(tmp_path / "bad.pth", "parts do not fit together", dataset="kidney")


def test_another_networks_weights_are_named(reference, tmp_path):
    vit = {"cls_token": torch.ones(1, 1, 8), "blocks.0.attn.qkv.weight": torch.ones(24, 8), "head.bias": torch.ones(2)}
    message = r"not a LiteMIL checkpoint; give a fold_<k>_best.pth.*\(it holds cls_token, blocks.0.attn.qkv.weight"
    torch.save(vit, tmp_path / "vit.pth")
    check_refused(tmp_path / "vit.pth", message, dataset="kidney")
    torch.save(vit | {f"blocks.{block}.attn.proj.weight": torch.ones(8) for block in range(48)}, tmp_path / "vit.pth")
    check_refused(tmp_path / "vit.pth", message)
    torch.save({"model_state_dict": vit, "model_config": {"class_names": KIDNEY}}, tmp_path / "vit.pth")
    check_refused(tmp_path / "vit.pth", message)
    torch.save({f"module.{name}": part for name, part in reference.state_dict().items()}, tmp_path / "parallel.pth")
    check_refused(tmp_path / "parallel.pth", "not a LiteMIL checkpoint.*it holds module.stream.query", dataset="kidney")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    check_refused(tmp_path / "tensor.pth", r"not a LiteMIL checkpoint.*\(it holds a Tensor\)")


@pytest.mark.filterwarnings("ignore")  # PyTorch wonders about pickles it did not write
def test_damage_is_a_clear_error_or_harmless(all_folds):
    check_damage(all_folds)


@pytest.mark.filterwarnings("ignore")
def test_nothing_in_a_file_is_executed(reference, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model_state_dict": reference.state_dict(), "slide_accuracy": Evil()}, tmp_path / "evil.pth")
    check_refused(tmp_path / "evil.pth", "neither tensor, array nor plain value")
    assert not (tmp_path / "owned").exists()
