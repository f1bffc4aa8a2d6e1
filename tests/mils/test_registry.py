import json

import pytest
import torch
from mil_helpers import MERGEABLE, MODELS, small

from MILS import ModelError, build_mil, list_mils, mil_name, mil_options
from MILS.bag_model import BagModel
from MILS.mergeable import MergeableModel


def test_names_in_order_of_registration():
    assert list_mils() == ["LiteMIL", "ABMIL", "ABMIL_Multihead", "TransMIL", "meanPool", "maxPool"]


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("LiteMIL", {}, 559_490),
        ("LiteMIL", {"num_queries": 4}, 560_258),
        ("ABMIL", {}, 788_739),
        ("ABMIL_Multihead", {}, 657_668),
        ("ABMIL_Multihead", {"num_heads": 5}, 582_207),
        ("TransMIL", {}, 2_672_146),
        ("meanPool", {}, 296_066),
        ("maxPool", {}, 296_066),
    ],
)
def test_parameter_counts(name, options, count):
    model = build_mil(name, input_dim=1024, num_classes=2, **options)
    assert sum(p.numel() for p in model.parameters()) == count


def test_options_are_the_defaults_the_model_takes():
    assert mil_options("LiteMIL") == {"hidden_dim": 256, "num_heads": 4, "num_queries": 1, "dropout": 0.25}
    assert mil_options("MADMIL") == mil_options("ABMIL_Multihead")
    for name in MODELS:
        spec = build_mil(name, input_dim=5, num_classes=2).spec
        assert spec == {"name": name, "input_dim": 5, "num_classes": 2, **mil_options(name)}


def test_alias_is_resolved():
    assert mil_name("MADMIL") == "ABMIL_Multihead"
    assert build_mil("MADMIL", input_dim=5, num_classes=2).spec["name"] == "ABMIL_Multihead"


@pytest.mark.parametrize("name", MODELS)
def test_spec_and_state_make_the_model_again(name):
    model = small(name, dropout=0.125)
    spec = json.loads(json.dumps(model.spec))
    assert spec["dropout"] == 0.125
    again = build_mil(**spec).to(torch.float64).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    assert torch.equal(again(x)[0], model(x)[0])


@pytest.mark.parametrize("name", MODELS)
def test_all_but_transmil_take_a_slide_in_blocks(name):
    model = small(name)
    assert isinstance(model, MergeableModel) == hasattr(model, "forward_blocks") == (name in MERGEABLE)


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ModelError, match=r"'litemill'.*LiteMIL, ABMIL.*maxPool.*did you mean 'LiteMIL'"):
        build_mil("litemill", input_dim=5, num_classes=2)
    with pytest.raises(ModelError, match="did you mean 'MADMIL'"):
        mil_name("mad_mil")
    with pytest.raises(ModelError, match=r"maxPool$"):
        mil_options("xyzzy")


def test_unknown_hyperparameter_lists_the_known():
    with pytest.raises(ModelError, match="ABMIL has no hyperparameter num_queries; it takes hidden_dim, attention_dim"):
        build_mil("ABMIL", input_dim=5, num_classes=2, num_queries=4)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("LiteMIL", {"hidden_dim": 30}, "LiteMIL: hidden_dim 30 is not divisible by num_heads 4"),
        ("LiteMIL", {"hidden_dim": 1, "num_heads": 1}, "LiteMIL: hidden_dim must be at least 2, got 1"),
        ("LiteMIL", {"num_queries": 0}, "LiteMIL: num_queries must be a whole number of at least 1, got 0"),
        ("LiteMIL", {"num_queries": 1.5}, "num_queries must be a whole number"),
        ("LiteMIL", {"num_heads": True}, "num_heads must be a whole number"),
        ("meanPool", {"dropout": 1.0}, r"meanPool: dropout must be in \[0, 1\), got 1.0"),
        ("meanPool", {"dropout": -0.1}, "dropout must be in"),
        ("meanPool", {"dropout": float("nan")}, "dropout must be in"),
        ("maxPool", {"dropout": "0.1"}, "dropout must be in"),
        ("maxPool", {"hidden_dim": 1}, "hidden_dim must be at least 2"),
        ("ABMIL", {"gated": 1}, "gated must be true or false"),
        ("ABMIL_Multihead", {"num_heads": 512}, "ABMIL_Multihead: num_heads 512 leaves less than 2"),
        ("TransMIL", {"hidden_dim": 60}, "TransMIL: hidden_dim 60 is not divisible by num_heads 8"),
        ("TransMIL", {"num_classes": 0}, "TransMIL: num_classes must be at least 1, got 0"),
        ("TransMIL", {"input_dim": 0}, "TransMIL: input_dim must be at least 1, got 0"),
        ("TransMIL", {"input_dim": "1024"}, "input_dim must be at least 1, got '1024'"),
    ],
)
def test_bad_values_are_named(name, arguments, message):
    with pytest.raises(ModelError, match=message):
        build_mil(name, **{"input_dim": 5, "num_classes": 2, **arguments})


def test_a_hyperparameter_that_is_not_remembered_is_named():
    class Forgetful(BagModel):
        """Whose width does not reach its spec."""

        def __init__(self, input_dim, num_classes, *, width=4):
            super().__init__(input_dim, num_classes)

    with pytest.raises(ModelError, match=r"Forgetful: hand width to super\(\).__init__"):
        Forgetful(16, 2)
