"""Checkpoints of other toolkits are told by name, with what to do instead; nothing in them is executed."""

import pickle
from types import SimpleNamespace

import pytest
import torch

from MILS import build_mil
from tests.prediction.checkpoint_helpers import check_refused
from utils.prediction.checkpoint import load_checkpoint
from utils.prediction.foreign_checkpoints import names_of_pickle, origin

ATTENTION = ("attention_net.0.weight", "attention_net.3.attention_a.0.weight", "attention_net.3.attention_c.bias")
TRANSMIL = ("pos_layer.proj.weight", "_fc1.0.weight", "cls_token", "layer1.norm.weight", "layer1.attn.to_qkv.weight",
            "layer2.attn.to_out.0.bias", "norm.weight", "_fc2.weight")  # fmt: skip
STAMP = ("class_token", "project_features.0.weight", "transformer.layers.0.0.norm.weight", "mlp_head.0.weight")
THEIRS = {
    "a CLAM model; .*train.py.*or predict with CLAM": (
        *ATTENTION, "classifiers.weight", "instance_classifiers.0.weight"
    ),
    "a CLAM model": (*ATTENTION, "classifiers.0.weight", "classifiers.1.bias", "instance_classifiers.1.bias"),
    "an attention model of CLAM's": (*ATTENTION, "classifier.weight"),
    "a TransMIL model of its authors": TRANSMIL,
    "an ABMIL of another toolkit's; .*train.py": (
        "feature_extractor.0.weight", "attention_V.0.weight", "attention_U.0.bias", "attention_weights.weight"
    ),
    "an ABMIL of another": ("attention.0.weight", "attention.0.bias", "attention.2.weight", "classifier.0.weight"),
    "a DSMIL model": ("i_classifier.fc.0.weight", "b_classifier.q.weight", "b_classifier.fcc.weight"),
    "a model of torchmil's": ("pool.fc1.weight", "pool.fc1.bias", "pool.fc2.weight", "classifier.weight"),
    "a model of STAMP's": STAMP,
    "the weights of a vision transformer; .*--weights": ("cls_token", "blocks.0.attn.qkv.weight", "norm.bias"),
    "the weights of a ResNet": ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "fc.bias"),
}  # fmt: skip


def weights(names, prefix=""):
    return {f"{prefix}{name}": torch.ones(2) for name in names}


@pytest.mark.parametrize("message", THEIRS)
def test_whose_a_state_dict_is(message, tmp_path):
    names = THEIRS[message]
    path = tmp_path / "s_0_checkpoint.pt"
    for content in (
        weights(names), {"model_state_dict": weights(names)}, {"state_dict": weights(names, "model."), "epoch": 3},
        weights(names, "module."),
    ):  # fmt: skip
        torch.save(content, path)
        check_refused(path, f"not a LiteMIL checkpoint; .*it looks like {message}")


def test_a_lightning_checkpoint_of_an_unknown_model(tmp_path):
    content = {"state_dict": weights(("net.weight",)), "pytorch-lightning_version": "2.4.0", "epoch": 3}
    torch.save(content, tmp_path / "last.ckpt")
    check_refused(tmp_path / "last.ckpt", "it looks like a Lightning checkpoint; .*the code that trained it")


def test_what_cannot_be_loaded_is_looked_through_and_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    content = {
        "state_dict": weights(STAMP, "model."), "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"stamp_version": SimpleNamespace(), "evil": Evil()},
    }  # fmt: skip
    message = "neither tensor, array nor plain value; nothing in it was executed; it looks like a model of STAMP's"
    torch.save(content, tmp_path / "stamp.ckpt")
    check_refused(tmp_path / "stamp.ckpt", message)
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    check_refused(tmp_path / "old.ckpt", "it looks like a model of STAMP's")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content | {"state_dict": None}))
    check_refused(tmp_path / "model.pkl", "it looks like a model of STAMP's")
    assert not (tmp_path / "owned").exists()


def test_the_remedy_for_a_whole_model_is_to_save_its_state_dict(tmp_path):
    model = build_mil("LiteMIL", input_dim=8, num_classes=2, num_heads=4)
    for content in (model, {"model": model, "epoch": 3}, torch.nn.Linear(2, 2)):
        torch.save(content, tmp_path / "whole.pth")
        check_refused(
            tmp_path / "whole.pth", "like a whole model, pickled; of a LiteMIL save its state_dict .*train.py"
        )
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert load_checkpoint(tmp_path / "weights.pth", class_names=("a", "b")).model["input_dim"] == 8


def test_an_unknown_file_gets_the_general_message(tmp_path):
    torch.save(weights(("net.weight",)), tmp_path / "a.pth")
    check_refused(tmp_path / "a.pth", r"\(it holds net.weight\)$")
    assert origin([]) == ""
    for content in (b"", b"PK\3\4", b"\x80\x02}q\0X", b"no pickle at all"):
        (tmp_path / "damaged.pth").write_bytes(content)
        assert origin(names_of_pickle(tmp_path / "damaged.pth")) == ""
        check_refused(tmp_path / "damaged.pth", "not loadable")
    assert origin(names_of_pickle(tmp_path / "nowhere.pth")) == ""
