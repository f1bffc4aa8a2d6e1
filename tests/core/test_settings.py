"""Every default once, and numbers out of range refused by their flag's name."""

import dataclasses
import inspect
import math
import pickle
import re
import typing
from pathlib import Path

import numpy as np
import pytest

from datasets.demo import Demo
from datasets.download import Download
from utils.audit import Audit
from utils.bags.settings import Cohort, CohortFiles
from utils.compare import Comparison
from utils.convert import Conversion
from utils.core.errors import ConfigError
from utils.core.ray_settings import Cluster
from utils.core.settings import flag_of
from utils.features.settings import Extraction
from utils.learning.settings import Analyses, DryRun, Model, Preset, Protocol, Running, Training
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.pictures.settings import Pictures
from utils.prediction.settings import Prediction, PredictionRecipe
from utils.slides.settings import ExtractionFiles

ROOT = Path(__file__).resolve().parents[2]
# What must be given, so that each class can be made.
GIVEN = {
    Extraction: {},
    ExtractionFiles: {"input_dir": Path("slides"), "output_dir": Path("features")},
    CohortFiles: {},
    Cohort: {"dataset": "mine"},
    Model: {"mil": "LiteMIL"},
    Preset: {},
    Training: {},
    Protocol: {},
    Running: {},
    Analyses: {},
    Cluster: {"ray": "local"},
    DryRun: {},
    Comparison: {"runs": (Path("a"), Path("b"))},
    Demo: {},
    Download: {"name": "breast"},
    Prediction: {"out_of_fold": Path("run")},
    PredictionRecipe: {},
    Pictures: {"visualize": True},
    Conversion: {"input": Path("in"), "output": Path("out")},
    Audit: {"dataset": "mine"},
}
FIELDS = [(cls, field) for cls in GIVEN for field in dataclasses.fields(cls) if field.metadata]
LIMITED = [(cls, field) for cls, field in FIELDS if math.isfinite(field.metadata["least"])]


def named(pairs):
    return [f"{cls.__name__}.{field.name}" for cls, field in pairs]


def test_every_config_class_is_looked_at_here():
    text = "".join(path.read_text() for path in [*ROOT.glob("utils/**/*.py"), *ROOT.glob("datasets/*.py")])
    assert len(re.findall(r"^class \w+\((?:Settings|CohortFiles)\):", text, re.MULTILINE)) == len(GIVEN)


@pytest.mark.parametrize("cls", GIVEN)
def test_the_defaults_are_in_range_and_the_configs_frozen(cls):
    made = cls(**GIVEN[cls])
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(cls)[0].name, 1)
    with pytest.raises(ConfigError, match=f"{cls.__name__}: no setting no_such_setting"):
        cls(**GIVEN[cls], no_such_setting=1)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=named(FIELDS))
def test_every_number_has_a_limit_and_every_flag_a_help(cls, field):
    assert field.metadata["help"]
    if field.type in (int, float, int | None, float | None):
        assert math.isfinite(field.metadata["least"]), "a number without limits lets any typing error through"


@pytest.mark.parametrize(("cls", "field"), LIMITED, ids=named(LIMITED))
def test_numbers_out_of_range_are_refused_by_the_flags_name(cls, field):
    least, most = field.metadata["least"], field.metadata["most"]
    outside = [least - 1]
    outside += [most + 1] if math.isfinite(most) else []
    outside += [math.nan, math.inf, -math.inf] if float in (field.type, *typing.get_args(field.type)) else []
    for value in outside:
        with pytest.raises(ConfigError) as caught:
            cls(**GIVEN[cls], **{field.name: value})
        assert str(caught.value).startswith(f"{flag_of(field)} {value}: out of range; give a number ")
        assert f"{least}" in str(caught.value)
    for value in (least, most):
        if math.isfinite(value):
            assert getattr(cls(**GIVEN[cls], **{field.name: value}), field.name) == value


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (Training, {"epochs": "2"}, "--epochs '2': expected a whole number"),
        (Training, {"epochs": 2.0}, "--epochs 2.0: expected a whole number"),
        (Training, {"epochs": True}, "--epochs True: expected a whole number"),
        (Training, {"patience": None}, "--patience None: expected a whole number"),
        (Training, {"batch_size": "all"}, "--batch_size 'all': expected a whole number or one of auto"),
        (Training, {"lr": "fast"}, "--lr 'fast': expected a number"),
        (Training, {"lr": 0}, "--lr 0: out of range; give a number from 1e-08 to 1"),
        (Training, {"lr": 1e10}, "--lr 10000000000.0: out of range"),
        (Training, {"use_amp": 1}, "--no_amp 1: expected True or False"),
        (Training, {"epoch": 3}, "Training: no setting epoch; did you mean epochs?"),
        (Protocol, {"final": "Ensemble"}, "--final 'Ensemble': expected one of best, ensemble, refit, all; did you"),
        (Protocol, {"monitor": "auroc"}, "--monitor 'auroc': expected one of auto, slide_loss, slide_auc"),
        (Protocol, {"monitor": "AUC"}, "--monitor 'AUC': expected one of .*; did you mean auc?"),
        (Protocol, {"monitor": "acu"}, "did you mean auc?"),
        (Protocol, {"monitor": "accuracy"}, "did you mean balanced_accuracy?"),
        (Protocol, {"splits": 3}, "--splits 3: expected a path"),
        (CohortFiles, {"class_names": [0, 1]}, r"--class_names \[0, 1\]: expected a list of text"),
        (CohortFiles, {"class_names": {"a", "b"}}, "--class_names .*: expected a list of text, whose order counts"),
        (CohortFiles, {"class_names": []}, "--class_names is empty; give at least one, or leave it out"),
        (Running, {"figure_format": ()}, "--figure_format is empty; give at least one, or leave it out"),
        (CohortFiles, {"class_names": "ab"}, "--class_names 'ab': expected a list of text"),
        (Cohort, {"allow": ["lost"]}, r"--allow \['lost'\]: expected one of missing, unknown, duplicate"),
        (Extraction, {"patch_size": None}, "--patch_size None: expected a whole number"),
        (Extraction, {"dtype": "float64"}, "--dtype 'float64': expected one of float16, float32; did you mean"),
        (Prediction, {"mode": "whole"}, "--mode 'whole': expected one of full, chunked"),
        (Prediction, {"checkpoint": "a.pth"}, "--checkpoint 'a.pth': expected a list of paths"),
        (Audit, {"json": "no"}, "--json 'no': expected True or False"),
    ],
)
def test_values_from_python_are_checked_as_flags_are(cls, given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        cls(**GIVEN[cls] | given)
    assert "\n" not in str(caught.value)


def test_what_means_the_same_becomes_the_settings_own_type():
    made = Training(epochs=np.int64(3), lr=np.float32(0.5), use_amp=np.bool_(False), batch_size=np.array(4))
    assert made == Training(epochs=3, lr=0.5, use_amp=False, batch_size=4)
    assert {type(value) for value in (made.epochs, made.lr, made.use_amp)} == {int, float, bool}
    files = CohortFiles(features_dir="features", class_names=np.array(["a", "b"]))
    assert files == CohortFiles(features_dir=Path("features"), class_names=("a", "b"))
    assert CohortFiles(allow={"missing"}) == CohortFiles(allow=("missing",))
    assert Protocol(monitor="auc").monitor == "slide_auc"
    assert dataclasses.replace(made, epochs=5).epochs == 5
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301 - made here


def test_the_flags_of_a_script_are_those_of_its_config():
    assert flag_of(next(field for field in dataclasses.fields(Training) if field.name == "use_amp")) == "--no_amp"
    assert flag_of(next(field for field in dataclasses.fields(Training) if field.name == "lr")) == "--lr"


def test_a_default_that_stands_in_a_signature_too_is_the_same():
    cohort = {field.name: field.default for field in dataclasses.fields(Cohort)}
    parameters = inspect.signature(MILDataset).parameters
    shared = [name for name in parameters if name in cohort and name != "class_names"]
    assert {"mode", "chunk_size", "feat_type", "allow", "features_dir"} <= set(shared)
    for name in ("mode", "chunk_size", "feat_type", "allow"):
        assert parameters[name].default == cohort[name], name
    parameters = inspect.signature(NestedCrossValidation).parameters
    settings = {field.name: field.default for cls in (Training, Protocol, Running) for field in dataclasses.fields(cls)}
    shared = set(parameters) & set(settings) - {"output_dir"}
    assert {"n_outer", "n_inner", "batch_size", "epochs", "patience", "device", "use_amp"} <= shared
    assert {name: parameters[name].default for name in shared} == {name: settings[name] for name in shared}
    assert PredictionRecipe.batch_size == Extraction.batch_size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of --input .* and --input_dir"),
        ({"input": "a.svs", "input_dir": "slides"}, "exactly one of --input .* and --input_dir"),
        ({"input_dir": "slides"}, "--input_dir needs --output_dir"),
        ({"input_dir": "slides", "output_dir": "out", "output": "a.h5"}, "--output names one file"),
        ({"input": "a.svs", "output": "a.h5", "output_dir": "out"}, "give one of --output"),
        ({"input": "a.svs", "output": "a.hdf"}, r"--output a\.hdf: ends in '\.hdf'"),
        ({"input": "a.svs", "output": "folder"}, "--output folder: ends in ''"),
        ({"input_dir": "slides", "write_slides_csv": "new.csv", "limit": 2}, "leave --limit out"),
        ({"input_dir": "slides", "write_slides_csv": "new.csv", "shard": "1/2"}, "leave --shard out"),
    ],
)
def test_inputs_and_outputs_that_exclude_each_other(given, message):
    with pytest.raises(ConfigError, match=message):
        ExtractionFiles(**given)


def test_answers_out_of_fold_have_no_table_to_account_for():
    with pytest.raises(ConfigError, match="--allow unknown: goes with --labels_csv"):
        Prediction(out_of_fold=Path("run"), allow=("missing", "unknown"))


@pytest.mark.parametrize(
    "given",
    [
        {"input": "a.svs"},
        {"input": "a.svs", "output": "a.pt"},
        {"input": "a.svs", "output_dir": "out"},
        {"input_dir": "slides", "output_dir": "out"},
    ],
)
def test_inputs_and_outputs_that_go_together(given):
    ExtractionFiles(**{name: Path(value) for name, value in given.items()})


def test_only_hyperparameters_that_were_given_reach_the_model():
    assert Model(mil="LiteMIL").hyperparameters() == {}
    assert Model(mil="LiteMIL", dropout=0.0, num_heads=2, input_dim=7).hyperparameters() == {
        "dropout": 0.0,
        "num_heads": 2,
    }
