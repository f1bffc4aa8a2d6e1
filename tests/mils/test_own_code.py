"""Files and classes that the user names, their arguments, and what runs only if it is named."""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from MILS import CodeError, ModelError, build_mil, mil_factory, mil_kinds, mil_options, own_code, use_mil
from MILS.registry import factory_of
from tests.mils.others import NET, Plain, write_net
from utils.core.files import digest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path):
    return write_net(tmp_path / "my_model.py")


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch):
    monkeypatch.setattr(own_code, "_named", {})


class TestSpec:
    def test_it_says_which_code_of_which_digest_made_the_model(self, file):
        name = use_mil(f"{file}:Net")
        spec = build_mil(name, input_dim=16, num_classes=3, hidden=6).spec
        assert len(spec.pop("digest")) == 64
        about = {"name": "my_model.Net", "code": "my_model.py:Net"}
        assert spec == about | {"input_dim": 16, "num_classes": 3, "hidden": 6}

    def test_the_same_file_elsewhere_makes_the_model_again(self, file, tmp_path):
        spec = mil_factory(f"{file}:Net", input_dim=16, num_classes=2)().spec
        own_code._named.clear()
        use_mil(f"{write_net(tmp_path / 'moved' / 'renamed.py')}:Net")
        again = build_mil(**spec)
        assert again.spec["name"] == "renamed.Net"
        assert again.spec["digest"] == spec["digest"]

    def test_it_is_not_run_because_a_spec_names_it(self, file):
        spec = mil_factory(f"{file}:Net", input_dim=16, num_classes=2)().spec
        own_code._named.clear()
        with pytest.raises(
            CodeError, match=r"my_model.py:Net, which runs only if you name it again: --mil path/to/my_"
        ):
            build_mil(**spec)
        for reference in (f"{file}:Net", "tests.mils.others:Plain"):
            with pytest.raises(ModelError, match="unknown model"):
                build_mil(reference, input_dim=16, num_classes=2)

    def test_a_changed_file_is_not_the_same(self, file):
        spec = mil_factory(f"{file}:Net", input_dim=16, num_classes=2)().spec
        write_net(file, NET.replace("hidden=4", "hidden=5"))
        other = mil_factory(f"{file}:Net", input_dim=16, num_classes=2)().spec
        own_code._named.pop(("Net", spec["digest"]))
        message = rf"of digest {spec['digest'][:8]}, and what you named has {other['digest'][:8]}: it changed since"
        with pytest.raises(CodeError, match=message):
            build_mil(**spec)

    def test_a_class_in_a_package(self):
        model = mil_factory("tests.mils.others:Plain", input_dim=16, num_classes=2)()
        assert model.spec["code"] == "tests.mils.others:Plain"
        assert model.spec["name"] == "tests.mils.others.Plain"

    def test_a_function_that_makes_modules(self, file):
        model = mil_factory(f"{file}:make", input_dim=16, num_classes=2, hidden=3)()
        assert model.module.score.in_features == 3

    def test_a_bag_model_in_a_file(self, tmp_path):
        text = (
            "import torch\nfrom MILS import BagModel\nclass Mean(BagModel):\n"
            "    def __init__(self, input_dim, num_classes, *, width=4):\n"
            "        super().__init__(input_dim, num_classes, width=width)\n"
            "        self.head = torch.nn.Linear(input_dim, num_classes)\n"
            "    def forward(self, x, mask=None):\n"
            "        return self.head(self.cast(x).mean(1)), {'attn': None}\n"
        )
        model = mil_factory(f"{write_net(tmp_path / 'ours.py', text)}:Mean", input_dim=16, num_classes=2, width=3)()
        assert type(model).__name__ == "Mean"
        assert (model.spec["name"], model.spec["width"]) == ("ours.Mean", 3)
        assert type(build_mil(**model.spec)) is type(model)


class TestArguments:
    def test_their_names_defaults_and_types(self, file):
        name = use_mil(f"{file}:Net")
        assert mil_options(name) == {"hidden": 4, "dropout": 0, "act": "tanh"}
        assert mil_kinds(name) == {"hidden": int | float, "dropout": float, "act": str}

    @pytest.mark.parametrize("names", [("in_dim", "n_classes"), ("feat_dim", "out_dim"), ("L_in", "num_classes")])
    def test_width_and_outputs_are_filled_in(self, names, tmp_path):
        width, outputs = names
        text = NET.replace("in_dim", width).replace("n_classes", outputs)
        model = mil_factory(f"{write_net(tmp_path / f'{width}.py', text)}:Net", input_dim=12, num_classes=3)()
        assert model(torch.zeros(1, 2, 12))[0].shape == (1, 3)

    def test_a_shape_is_filled_in(self, tmp_path):
        text = (
            "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, in_shape=None, n_classes=2):\n"
            "        super().__init__(nn.AdaptiveAvgPool2d((1, in_shape[0])), nn.Linear(in_shape[0], n_classes))\n"
        )
        model = mil_factory(f"{write_net(tmp_path / 'shape.py', text)}:Net", input_dim=12, num_classes=3)()
        assert model(torch.zeros(1, 2, 12))[0].shape == (1, 3)

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            ("Net", {"hiden": 3}, "my_model.py:Net has no hyperparameter hiden; it takes hidden, dropout, act; did"),
            ("Net", {"in_dim": 3}, "has no hyperparameter in_dim"),
            ("Needy", {}, r"my_model.py:Needy: needs depth; give --mil_args depth=\.\.\."),
            ("Net", {"dropout": 7}, r"constructor raised ValueError: dropout probability.*\(my_model.py, line 9\)"),
        ],
    )  # fmt: skip
    def test_that_do_not_fit(self, name, arguments, message, file):
        with pytest.raises(ModelError, match=message):
            mil_factory(f"{file}:{name}", input_dim=16, num_classes=2, **arguments)()


class TestReferences:
    @pytest.mark.parametrize(
        ("reference", "message"),
        [
            ("{folder}/none.py:Net", "none.py: cannot be read .No such file"),
            ("{folder}/my_model.py:Nit", "my_model.py: no Nit in it; it has Net, Broken, Needy; did you mean Net"),
            ("{folder}/my_model.py:number", "my_model.py:number: is no torch.nn.Module and no function that makes one"),
            ("{folder}/my_model.py:", "expected path/to/file.py:Class or package.module:Class"),
            ("no_such_package.models:Net", "no_such_package.models: cannot be imported: ModuleNotFoundError"),
            ("pathlib:Path", "pathlib:Path: is no torch.nn.Module"),
            ("{folder}/typo.py:Net", r"typo.py: cannot be imported: SyntaxError: .* \(typo.py, line 2\)"),
            ("{folder}/fails.py:Net", r"fails.py: cannot be imported: ZeroDivisionError: .* \(fails.py, line 3\)"),
        ],
    )
    def test_that_cannot_be_used(self, reference, message, file):
        write_net(file.with_name("typo.py"), "import torch\nclass Net(:\n")
        write_net(file.with_name("fails.py"), "import torch\n\n1 / 0\n")
        with pytest.raises(ModelError, match=message):
            use_mil(reference.format(folder=file.parent))

    def test_what_stands_beside_a_file_can_be_imported(self, tmp_path):
        write_net(tmp_path / "layers_beside.py")
        reference = f"{write_net(tmp_path / 'user.py', 'from layers_beside import Net')}:Net"
        model = mil_factory(reference, input_dim=16, num_classes=2)()
        assert model.spec["digest"] != digest(b"")
        assert model.spec["code"] == "user.py:Net"


class TestFactories:
    def test_another_process_knows_the_code(self, file, tmp_path):
        factory = mil_factory(f"{file}:Net", input_dim=16, num_classes=2, hidden=3)
        (tmp_path / "work").write_bytes(pickle.dumps((factory, factory().eval())))
        script = (
            "import pickle, sys; from pathlib import Path; from MILS import build_mil\n"
            "factory, model = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
            "print(build_mil(**factory().spec).spec == model.spec, model.training)"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "work")]
        assert subprocess.check_output(command, cwd=ROOT, text=True) == "True False\n"

    def test_another_process_finds_another_file(self, file):
        work = pickle.dumps(mil_factory(f"{file}:Net", input_dim=16, num_classes=2))
        own_code._named.clear()
        write_net(file, NET.replace("hidden=4", "hidden=5"))
        with pytest.raises(CodeError, match=r"my_model.py:Net changed during the run .*; put it back"):
            pickle.loads(work)  # noqa: S301 - made here

    def test_of_a_class_and_of_one_with_hyperparameters(self):
        assert factory_of(Plain, 16, 2)().spec["name"] == "others.Plain"
        bound = factory_of(partial(Plain, 16, num_classes=2), 16, 2)()
        assert bound.spec == factory_of(Plain, 16, 2)().spec
        with pytest.raises(ModelError, match="input_dim is 8, these data need 16; leave it out"):
            factory_of(partial(Plain, 8, 2), 16, 2)

    def test_of_bag_models_stay_as_they_are(self):
        for factory in (
            partial(build_mil, "ABMIL", input_dim=16, num_classes=2),
            lambda: build_mil("ABMIL", input_dim=4, num_classes=2),
        ):
            assert factory_of(factory, 16, 2) is factory


@pytest.mark.parametrize("name", ["ABMIL", "DSMIL", "CLAM_SB", "TransformerABMIL"])
def test_models_of_torchmil(name):
    pytest.importorskip("torchmil", reason="torchmil is no dependency: uv pip install torchmil")
    model = mil_factory(f"torchmil.models:{name}", input_dim=16, num_classes=2)().eval()
    logits, aux = model(torch.randn(2, 5, 16))
    assert logits.shape == (2, 2)
    assert model.is_binary_only
    torch.testing.assert_close(aux["attn"].sum(dim=-1), torch.ones(2, 1))
