"""Other people's models from training to prediction: by the command line, by Python, on several processes."""

from functools import partial

import numpy as np
import pytest
import torch

from MILS import own_code
from tests.learning.runs import assert_same, contents, leave_unfinished, make_cv
from tests.mils.others import NET, Plain, write_net
from utils.core.errors import CheckpointError, ConfigError, TrainingError
from utils.core.files import read_json
from utils.inference import SlidePredictor

FLAGS = ("--n_outer", 2, "--n_inner", 2, "--epochs", 2, "--device", "cpu", "--seed", 3, "--dataset", "mine")

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch):
    monkeypatch.setattr(own_code, "_named", {})


@pytest.fixture
def train(script, cohort, tmp_path):
    """Train a class of a file; return what the command said."""

    def run(name: str = "Net", *flags, text: str = NET, folder: str = "run"):
        file = write_net(tmp_path / "my_model.py", text)
        data = ("--labels_csv", cohort[0], "--features_dir", cohort[1], "--output_dir", tmp_path / folder)
        return script("train", "--mil", f"{file}:{name}", *FLAGS, *data, *flags)

    return run


@pytest.fixture
def predict(script, cohort, tmp_path):
    def run(*flags, folder: str = "run"):
        slide = cohort[1] / "P000-S1.h5"
        data = ("--input", slide, "--device", "cpu", "--output_dir", tmp_path / "predicted")
        return script("predict", "--checkpoint", tmp_path / folder / "fold_1_best.pth", *data, *flags)

    return run


class TestCommands:
    def test_from_training_to_prediction(self, train, predict, script, tmp_path):
        outcome = train("Net", "--mil_args", "hidden=6", "act=relu")
        assert outcome.code == 0, outcome.err
        assert f"--visualize --mil {tmp_path}/my_model.py:Net" in outcome.out
        spec = read_json(tmp_path / "run" / "outputs.json")["model"]
        assert (spec["name"], spec["code"], spec["hidden"]) == ("my_model.Net", "my_model.py:Net", 6)
        again = train("Net", "--mil_args", "hidden=6", "act=relu")
        assert "this run is finished" in again.err
        reference = f"{tmp_path}/my_model.py:Net"
        assert predict("--mil", reference).code == 0
        out_of_fold = ("--out_of_fold", tmp_path / "run", "--device", "cpu", "--output_dir", tmp_path / "folds")
        outcome = script("predict", *out_of_fold, "--mil", reference)
        assert outcome.code == 0, outcome.err
        assert "largest difference 0" in outcome.out

    def test_what_is_not_named_again_does_not_run(self, train, predict, tmp_path):
        marker = tmp_path / "it ran"
        assert train(text=f"{NET}\nfrom pathlib import Path\nPath({str(marker)!r}).touch()\n").code == 0
        marker.unlink()
        own_code._named.clear()
        for flags in ((), ("--mil", "LiteMIL")):
            outcome = predict(*flags)
            assert outcome.code == 1
            (line,) = outcome.errors
            assert "fold_1_best.pth: was trained with code of your own, my_model.py:Net, which runs only" in line
            assert "--mil path/to/my_model.py:Net" in line
        assert not marker.exists()

    def test_a_file_that_changed_is_another_run_and_no_prediction(self, train, predict, tmp_path):
        assert train().code == 0
        own_code._named.clear()
        changed = NET.replace("hidden=4", "hidden=5")
        outcome = predict("--mil", f"{write_net(tmp_path / 'my_model.py', changed)}:Net")
        assert [line.partition(" of digest")[0] for line in outcome.errors] == [
            f"error: {tmp_path}/run/fold_1_best.pth: was trained with my_model.py:Net"
        ]
        outcome = train(text=changed)
        assert "held another run (the code of my_model.py:Net differs)" in outcome.err

    def test_a_grid_varies_their_arguments_and_compare_counts_weights(self, train, script, tmp_path):
        assert train("Net", "--grid", "hidden=4,6 dropout=0,0.5").code == 0
        assert train("make", "--mil_args", "hidden=3", folder="other").code == 0
        settings = read_json(tmp_path / "run" / "run.json")["identity"]["grid"]
        assert settings == [f"hidden={hidden} dropout={dropout}" for hidden in (4, 6) for dropout in (0.0, 0.5)]
        record = read_json(tmp_path / "other" / "outputs.json")
        assert record["parameters"] == [16 * 3 + 3 + 3 + 1 + 3 * 2 + 2] * 2
        own_code._named.clear()

    def test_a_dry_run(self, train):
        outcome = train("Net", "--dry_run")
        assert outcome.code == 0, outcome.err
        assert "Nothing was trained" in outcome.out

    @pytest.mark.parametrize(
        ("name", "flags", "message"),
        [
            ("Nit", (), "my_model.py: no Nit in it; it has Net, Broken, Needy; did you mean Net?"),
            ("Needy", (), "my_model.py:Needy: needs depth; give --mil_args depth=..."),
            ("Net", ("--mil_args", "hidden=few"), "--mil_args hidden='few': expected a whole number or a number"),
            ("Net", ("--mil_args", "hidden"), "--mil_args hidden: not understood; write each name once"),
            ("Net", ("--mil_args", "wide=3"), "my_model.py:Net has no hyperparameter wide; it takes hidden"),
            ("Net", ("--grid", "wide=3,4"), "--grid wide: no hyperparameter of training or my_model.Net"),
            ("Net", ("--num_heads", 3), "my_model.py:Net has no hyperparameter num_heads"),
            ("Broken", (), "my_model.py:Broken: its forward raised ValueError: too few patches (my_model.py, line 21)"),
        ],
    )
    def test_errors_are_one_line(self, name, flags, message, train):
        outcome = train(name, *flags)
        assert outcome.code == 1
        (line,) = outcome.errors
        assert message in line


class TestPython:
    def test_on_two_processes_as_on_one_and_resumed(self, dataset, tmp_path):
        file = write_net(tmp_path / "my_model.py")
        cls = own_code.load(f"{file}:Net")
        folders = [tmp_path / name for name in ("one", "two", "resumed")]
        factory, settings = partial(cls, 16, 2), {"grid": {"hidden": [3, 4]}, "final": "ensemble"}
        for folder, jobs in zip(folders, (1, 2, 1), strict=True):
            cv = make_cv(dataset, folder, factory, jobs=jobs, **settings)
            if folder.name == "resumed":
                leave_unfinished(cv)
                cv = make_cv(dataset, folder, factory, jobs=jobs, **settings)
            cv.run()
        assert_same(contents(folders[1]), contents(folders[0]))
        assert_same(contents(folders[2]), contents(folders[0]))

    @pytest.mark.parametrize("make", [Plain, partial(Plain)])
    def test_a_class(self, make, dataset, cohort, tmp_path):
        make_cv(dataset, tmp_path / "run", make, n_outer=2).run()
        predictor = SlidePredictor(tmp_path / "run", Plain, device="cpu")
        assert predictor.predict(cohort[1] / "P000-S1.h5").probabilities.shape == (2,)
        own_code._named.clear()
        with pytest.raises(CheckpointError, match=r"others.py:Plain, which runs only if you name it again"):
            SlidePredictor(tmp_path / "run", device="cpu")

    @pytest.mark.parametrize("outputs", [1, 3])
    def test_outputs_that_do_not_fit(self, outputs, dataset, tmp_path):
        class Stubborn(Plain):
            """Has its own number of outputs."""

            def __init__(self, input_dim):
                super().__init__(input_dim, outputs)

        if outputs == 1:
            assert make_cv(dataset, tmp_path, Stubborn).spec["num_classes"] == 2
        else:
            with pytest.raises(ConfigError, match=r"Stubborn: its forward must give 2 logits for a bag, got \(1, 3\)"):
                make_cv(dataset, tmp_path, Stubborn)

    def test_an_error_in_the_midst_of_a_training(self, dataset, tmp_path):
        calls = []

        class Late(Plain):
            """Breaks after some bags."""

            def forward(self, x):
                calls.append(x)
                if len(calls) > 40:
                    raise ValueError("tired")
                return super().forward(x)

        message = (
            r"^outer fold \d, inner fold \d: others.*Late|^outer fold \d.*Late: its forward raised ValueError: tired"
        )
        with pytest.raises(TrainingError, match=message):
            make_cv(dataset, tmp_path, Late).run()


TASKS = {
    "regression": (1, ("--target_column", "number")),
    "survival": (None, ("--time_column", "time", "--event_column", "event")),
    "ordinal": (2, ("--target_column", "grade", "--order", "low,middle,high")),
    "multilabel": (2, ("--target_columns", "event,other")),
}


class TestTasks:
    @pytest.fixture
    def labels(self, cohort, tmp_path):
        """The cohort, of two slides of each patient, with a column of each kind."""
        head, *lines = cohort[0].read_text().splitlines()
        grades = "low", "middle", "high"
        rows = [
            f"{line},{patient + 0.5},{10 + patient},{patient % 2},{patient % 3 == 0:d},{grades[patient % 3]}"
            for patient, line in ((number // 2, line) for number, line in enumerate(lines))
        ]
        (tmp_path / "labels.csv").write_text("\n".join([f"{head},number,time,event,other,grade", *rows]) + "\n")
        return tmp_path / "labels.csv"

    @pytest.mark.parametrize("task", TASKS)
    def test_each_has_its_number_of_logits(self, task, labels, train, tmp_path):
        outputs, flags = TASKS[task]
        outcome = train("Net", "--task", task, *flags, "--labels_csv", labels)
        assert outcome.code == 0, outcome.err
        found = read_json(tmp_path / "run" / "outputs.json")["model"]["num_classes"]
        assert found == outputs if outputs else found > 2

    def test_a_single_logit_stands_for_two_classes_only(self, labels, train):
        single = NET.replace("self.head((a * h).sum(dim=1)), a", "self.head((a * h).sum(dim=1))[0, 0], a")
        outcome = train("Net", "--task", "multilabel", *TASKS["multilabel"][1], "--labels_csv", labels, text=single)
        message = "my_model.py:Net gives a single logit, but the outputs are two, and not two classes"
        assert [message in line for line in outcome.errors] == [True]


class TestEvidence:
    def test_by_gradients_adds_up_to_the_change_of_the_signal(self, dataset, cohort, tmp_path):
        make_cv(dataset, tmp_path / "run", Plain, n_outer=2).run()
        predictor = SlidePredictor(tmp_path / "run", Plain, device="cpu")
        path = cohort[1] / "P000-S1.h5"
        for mode in ("full", "chunked"):
            prediction = predictor.predict_bag(predictor.bag(path), path, mode, 20, evidence=True)
            evidence = prediction.evidence
            assert evidence is not None
            assert not evidence.is_own_mean
            assert prediction.attention is None
            change = evidence.signals - evidence.reference
            np.testing.assert_allclose(evidence.contributions.sum(axis=1), change, atol=5e-4)
            assert np.abs(change).max() > 1e-2
            assert prediction.evidence_strength is not None
            assert prediction.evidence_strength.sum() == pytest.approx(1, abs=1e-5)

    def test_it_begins_at_the_mean_training_patch(self, dataset, tmp_path):
        make_cv(dataset, tmp_path / "run", Plain, n_outer=2).run()
        reference = SlidePredictor(tmp_path / "run", Plain, device="cpu").models[0].pooled_reference
        assert reference is not None
        assert reference.shape == (1, 16)
        assert torch.isfinite(reference).all()

    def test_it_is_drawn_where_there_is_no_attention(self, script, cohort, tmp_path):
        own_code.of_maker(Plain)
        data = ("--labels_csv", cohort[0], "--features_dir", cohort[1], "--output_dir", tmp_path / "run")
        assert script("train", "--mil", "tests.mils.others:Plain", *FLAGS, *data).code == 0
        flags = ("--mil", "tests.mils.others:Plain", "--device", "cpu", "--output_dir", tmp_path / "out", "--top_k", 3)
        slide = ("--checkpoint", tmp_path / "run", "--input", cohort[1] / "P000-S1.h5", "--visualize")
        outcome = script("predict", *slide, *flags)
        assert outcome.code == 0, outcome.err
        assert outcome.err.count("gives no attention, so there is no attention map; its evidence is by gradients") == 1
        assert (tmp_path / "out" / "P000-S1_evidence.png").exists()
        outcome = script("predict", *slide, *flags, "--faithfulness")
        assert "its model gives no attention; leave --faithfulness out" in outcome.errors[0]
