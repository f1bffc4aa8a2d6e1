"""Finished runs are compared only where they can be, and each figure of the comparison is what it says."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.cohort import write_cohort
from tests.drawing import drawn_coarsely
from tests.small import classification_metrics
from utils.compare import Difference, check_metrics, compare, folder_name, read_runs, report
from utils.core.errors import LiteMILError
from utils.core.files import write_json
from utils.core.plots import save_figure
from utils.evaluation.comparison_figures import comparison_figure, runs_roc_figure
from utils.evaluation.paired_tests import holm, nadeau_bengio
from utils.evaluation.predictions import Predictions
from utils.learning.finished_runs import read_run
from utils.tasks.classification import Classification

CLASSES = ["benign", "malignant"]
TASK = Classification(tuple(CLASSES))
METRICS = ("auc", "balanced_accuracy", "brier")
FOLDS, PATIENTS = 4, 24
SPEC = {"name": "meanPool", "input_dim": 16, "num_classes": 2}


def write_run(
    folder: Path, signal: float, seed: int = 0, repeats: int = 2, spec: dict = SPEC, shuffle: int = 0
) -> Path:
    """A finished run on 24 patients of two slides, whose answers are right by `signal`; `shuffle` orders its files."""
    rng, order = np.random.default_rng(seed), np.random.default_rng(shuffle)
    slides = pd.DataFrame(
        [
            (f"P{patient:02d}-{slide}", f"P{patient:02d}", patient % 2)
            for patient in range(PATIENTS)
            for slide in (1, 2)
        ],
        columns=["wsi_id", "case_id", "class"],
    )
    parts, folds = [], []
    for repeat in range(1, repeats + 1):
        dealt = np.random.default_rng(repeat).permutation(PATIENTS // 2) % FOLDS
        fold_of = np.repeat(dealt, 4)  # neighbouring patients, one of each class, stay together
        positive = 1 / (1 + np.exp(-(signal * (2 * slides["class"] - 1) + rng.standard_normal(len(slides)))))
        first = (repeat - 1) * FOLDS + 1
        parts.append(
            pd.DataFrame(
                {
                    "wsi_id": slides["wsi_id"], "case_id": slides["case_id"],
                    "label": np.array(CLASSES)[slides["class"]],
                    "predicted": np.array(CLASSES)[(positive > 0.5).astype(int)],
                    "prob_benign": 1 - positive, "prob_malignant": positive,
                    "fold": fold_of + first, "repeat": repeat,
                }
            )
        )  # fmt: skip
        for fold in range(FOLDS):
            rest = [other for other in range(FOLDS) if other != fold]
            ids = [order.permutation(slides["wsi_id"][fold_of == one]).tolist() for one in range(FOLDS)]
            inner = [
                {"train": [one for other in rest if other != val for one in ids[other]], "val": ids[val]}
                for val in rest
            ]
            folds.append({"fold": fold + first, "repeat": repeat, "test": ids[fold], "inner": inner})
    table = pd.concat(parts).sample(frac=1, random_state=shuffle) if shuffle else pd.concat(parts)
    folder.mkdir(parents=True)
    table.to_csv(folder / "predictions.csv", index=False)
    write_json(folder / "splits.json", {"seed": 0, "folds": folds})
    write_json(folder / "run.json", {"finished": True})
    labels = (table["label"] == CLASSES[1]).astype(int).to_numpy()
    predictions = Predictions(
        *(table[name].to_numpy() for name in ("wsi_id", "case_id")), labels,
        table[["prob_benign", "prob_malignant"]].to_numpy(), TASK, table["repeat"].to_numpy(), 0,
    )  # fmt: skip
    outputs = {
        "model": spec,
        "class_names": CLASSES,
        "pooled": predictions.metrics,
        "intervals_95": predictions.intervals,
        "fold_results": [{"fold": fold["fold"], "selection": {"setting": {}}} for fold in folds],
    }
    write_json(folder / "outputs.json", outputs)
    return folder


@pytest.fixture(scope="module")
def written_runs(tmp_path_factory) -> list[Path]:
    """A good, a fair and a useless run, which no test may change."""
    outputs, models = tmp_path_factory.mktemp("outputs"), (("LiteMIL", 1.5), ("ABMIL", 0.7), ("meanPool", 0.0))
    return [write_run(outputs / name / "mine", signal, seed) for seed, (name, signal) in enumerate(models)]


@pytest.fixture
def runs(written_runs, tmp_path) -> list[Path]:
    """Copies of the three runs."""
    return [shutil.copytree(run, tmp_path / "outputs" / run.parent.name / run.name) for run in written_runs]


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def change_table(path: Path, change: Callable[[pd.DataFrame], object]) -> None:
    table = pd.read_csv(path)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)


def refusal(*paths: Path, metrics: tuple[str, ...] = METRICS) -> str:
    with pytest.raises(LiteMILError) as caught:
        check_metrics(read_runs(paths), metrics)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of_slides(paths: list[Path], metrics: Sequence[str]) -> list[Difference]:
    return [one for one in compare(read_runs(paths), metrics) if one.unit == "slide"]


def by_metric(differences: list[Difference], metric: str) -> list[Difference]:
    return [one for one in differences if one.metric == metric]


def test_every_pair_in_every_metric(runs):
    differences = of_slides(runs, METRICS)
    names = ("LiteMIL/mine", "ABMIL/mine", "meanPool/mine")
    pairs = [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
    assert [(one.first, one.second) for one in differences] == pairs * 3
    assert [one.metric for one in differences] == [name for name in METRICS for _ in range(3)]
    for one in differences:
        assert one.low < one.difference < one.high
        assert one.folds == 2 * FOLDS
    good_bad = by_metric(differences, "auc")[1]
    assert 0 < good_bad.low < good_bad.models_low, "other trainings are covered, too"
    assert good_bad.p_models < good_bad.p < 0.01
    assert good_bad.p_corrected_t < 0.05
    assert by_metric(differences, "brier")[1].high < 0


def test_patients_of_several_slides_are_compared_first_by_the_mean_of_their_slides(runs):
    """By another way: runs of one row per patient, whose answer is that mean."""
    differences = [one for one in compare(read_runs(runs[:2]), METRICS) if one.unit == "patient"]
    assert all(one.is_primary for one in differences)
    for path in runs[:2]:
        table = pd.read_csv(path / "predictions.csv")
        how = {name: "mean" if name.startswith("prob_") else "first" for name in table}
        table = table.groupby(["repeat", "case_id"], as_index=False).agg(how)
        table.to_csv(path / "predictions.csv", index=False)
        splits = (path / "splits.json").read_text()
        (path / "splits.json").write_text(re.sub(r',\s*"P\d\d-2"|"P\d\d-2",\s*', "", splits))
    alone = compare(read_runs(runs[:2]), METRICS)
    assert [one.unit for one in alone] == ["slide"] * 3, "a patient has one slide"
    for one, other in zip(alone, differences, strict=True):
        for field in ("difference", "low", "p", "models_high", "fold_mean", "p_corrected_t", "p_holm"):
            assert getattr(one, field) == pytest.approx(getattr(other, field)), (one.metric, field)


def test_the_differences_are_those_of_the_runs_own_figures(runs):
    """By another way: from the files, the folds' figures and the sizes of the folds."""
    (difference,) = of_slides(runs[:2], ["auc"])
    tables = [pd.read_csv(run / "predictions.csv") for run in runs[:2]]
    folds = []
    for fold in range(1, 2 * FOLDS + 1):
        rows = [table[table["fold"] == fold] for table in tables]
        aucs = [
            classification_metrics(
                (one["label"] == "malignant").astype(int).to_numpy(), one[["prob_benign", "prob_malignant"]].to_numpy()
            )["auc"]
            for one in rows
        ]
        folds.append((aucs[0] - aucs[1], 2 * PATIENTS - len(rows[0]), len(rows[0])))
    values, n_train, n_test = zip(*folds, strict=True)
    assert difference.fold_mean == pytest.approx(np.mean(values))
    # Folds of one size with as many of each class have as many pairs: the mean over them is the share of all pairs.
    assert difference.difference == pytest.approx(np.mean(values))
    assert difference.p_corrected_t == pytest.approx(nadeau_bengio(values, n_train, n_test)[1])


def test_a_pair_is_the_same_in_any_company_and_order(runs, tmp_path):
    among = by_metric(of_slides(runs, METRICS), "brier")
    (alone,) = of_slides(runs[:2], ["brier"])
    shuffled = write_run(tmp_path / "shuffled" / "ABMIL" / "mine", 0.7, 1, shuffle=5)
    assert (shuffled / "splits.json").read_bytes() != (runs[1] / "splits.json").read_bytes()
    (reordered,) = of_slides([runs[0], shuffled], ["brier"])
    (backward,) = of_slides([runs[1], runs[0]], ["brier"])
    for field in ("difference", "low", "high", "p", "models_low", "p_models", "fold_mean", "folds", "p_corrected_t"):
        assert getattr(alone, field) == getattr(among[0], field) == pytest.approx(getattr(reordered, field))
    assert backward.p == pytest.approx(alone.p)
    assert (backward.low, backward.high) == pytest.approx((-alone.high, -alone.low))


def test_holm_is_over_the_pairs_of_the_primary_metric_and_over_all_others(runs):
    differences = of_slides(runs, METRICS)
    primary = by_metric(differences, METRICS[0])
    others = [one for one in differences if one.metric != METRICS[0]]
    assert (len(primary), len(others)) == (3, 6)
    for family in (primary, others):
        assert [one.p_holm for one in family] == holm([one.p for one in family])
        assert any(one.p_holm > one.p for one in family)


def test_runs_that_answer_alike_are_not_told_apart(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    (difference,) = of_slides([runs[0], copy], ["auc"])
    assert (difference.difference, difference.low, difference.high, difference.p) == (0, None, None, 1)
    assert difference.p_corrected_t is None
    assert difference.folds == 2 * FOLDS


def test_slides_are_ranked_within_a_repeat(runs, tmp_path):
    """A second repeat with all its answers squeezed into a tenth of the range ranks its slides as before."""
    squeezed = shutil.copytree(runs[0], tmp_path / "squeezed")
    table = pd.read_csv(squeezed / "predictions.csv")
    table["prob_malignant"] *= np.where(table["repeat"] == 2, 0.1, 1)
    table.to_csv(squeezed / "predictions.csv", index=False)
    auc, brier = of_slides([runs[0], squeezed], ["auc", "brier"])
    assert (auc.difference, auc.low, auc.high, auc.p, auc.fold_mean) == (0, None, None, 1, 0)
    assert brier.high < 0


def test_folds_where_a_figure_is_undefined_do_not_count(tmp_path):
    """Each fold tests one class only: no fold has an AUC, the pooled slides have."""
    runs = [write_run(tmp_path / name, signal, repeats=1) for name, signal in (("a", 1.0), ("b", 0.5))]
    for run in runs:
        table = pd.read_csv(run / "predictions.csv")
        table["fold"] = (table["label"] == "malignant") * 2 + table["case_id"].str[1:].astype(int) // 2 % 2 + 1
        table.to_csv(run / "predictions.csv", index=False)
        tests = [table["wsi_id"][table["fold"] == fold].tolist() for fold in range(1, 5)]
        folds = [
            {
                "fold": number,
                "repeat": 1,
                "test": test,
                "inner": [{"train": tests[number % 4], "val": tests[number - 2]}],
            }
            for number, test in enumerate(tests, start=1)
        ]
        write_json(run / "splits.json", {"folds": folds})
    auc, accuracy = of_slides(runs, ["auc", "accuracy"])
    assert (auc.fold_mean, auc.folds, auc.p_corrected_t) == (None, 0, None)
    pooled = [run.predictions.metrics["auc"] for run in read_runs(runs)]
    assert auc.difference == pytest.approx(pooled[0] - pooled[1]), "of all slides, as no fold can rank its own"
    assert accuracy.folds == 4


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["o/A/x", "o/B/x"], ["A/x", "B/x"]),
        (["o/A/x", "o/A/y"], ["x", "y"]),
        (["1/A/x", "2/A/x", "2/B/x"], ["1/A/x", "2/A/x", "2/B/x"]),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(tmp_path, paths, names):
    folders = [write_run(tmp_path / path, 1.0, repeats=1) for path in paths]
    assert [run.name for run in read_runs(folders)] == names


def test_what_is_no_finished_run(runs, tmp_path):
    good, other, _ = runs
    assert "nowhere: no finished training run (run.json is missing)" in refusal(good, tmp_path / "nowhere")
    (other / "splits.json").rename(tmp_path / "splits.json")
    assert "splits.json is missing" in refusal(good, other)
    (tmp_path / "splits.json").rename(other / "splits.json")
    change_json(other / "run.json", lambda content: content.update(finished=False))
    assert "is not finished; give its train.py command again" in refusal(good, other)
    (other / "run.json").write_text("{")
    assert "run.json: not readable as JSON" in refusal(good, other)


def test_the_same_run_twice(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs[0].parent)
    (tmp_path / "link").symlink_to(runs[0])
    for again in (runs[0], Path("mine"), tmp_path / "link"):
        assert "given twice" in refusal(runs[0], runs[1], again)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.drop(columns="repeat"), "a slide twice in one repeat"),
        (lambda table: table.iloc[:0], "no slide in it"),
        (lambda table: table.replace({"label": {"benign": "normal"}}), "a label that is none of"),
        (lambda table: table.assign(prob_benign=np.nan), "could not convert"),
        (lambda table: table.assign(prob_benign=1.5), "a probability that is no number from 0 to 1"),
        (lambda table: table.assign(fold="first"), "first"),
        (lambda table: pd.concat([table, table[:1]]), "a slide twice in one repeat"),
        (
            lambda table: table.assign(case_id=table["case_id"].where(table.index > 0, "other")),
            "two labels or patients",
        ),
        (lambda table: table[1:], "not of one run (P00-1 of fold"),
        (lambda table: table.assign(prob_malignant=table["prob_malignant"][::-1].to_numpy()), "in outputs.json and"),
    ],
)
def test_damaged_predictions(runs, change, told):
    change_table(runs[1] / "predictions.csv", change)
    message = refusal(runs[0], runs[1])
    assert told in message
    assert str(runs[1]) in message


def test_other_classes(runs):
    change_json(runs[1] / "outputs.json", lambda content: content.update(class_names=CLASSES[::-1]))
    message = refusal(runs[0], runs[1])
    assert "classes malignant, benign, those of" in message
    assert "--class_names" in message
    change_json(runs[1] / "outputs.json", lambda content: content.update(class_names=None))
    assert "no class_names" in refusal(runs[0], runs[1])


def test_runs_of_two_cohorts(runs):
    text = (runs[1] / "predictions.csv").read_text()
    (runs[1] / "predictions.csv").write_text(text.replace("P", "Q"))
    splits = (runs[1] / "splits.json").read_text()
    (runs[1] / "splits.json").write_text(splits.replace('"P', '"Q'))
    change_json(runs[1] / "outputs.json", lambda content: content.update(class_names=CLASSES[::-1]))
    assert f"not one slide of {runs[0]}; give runs of one cohort" in refusal(runs[0], runs[1])


def test_other_labels_and_patients(runs):
    good, relabeled, moved = runs
    slides = ["P03-1", "P05-1"]
    change_table(
        relabeled / "predictions.csv",
        lambda table: table.assign(label=table["label"].where(~table["wsi_id"].isin(slides), "benign")),
    )
    assert "2 slides with another label: P03-1 (malignant, benign), P05-1" in refusal(good, relabeled)
    change_table(
        moved / "predictions.csv",
        lambda table: table.assign(case_id=table["case_id"].where(table["wsi_id"] != "P03-1", "P99")),
    )
    assert "1 slide with another patient: P03-1 (P03, P99)" in refusal(good, moved)


def test_other_slides(runs):
    names = {f"P{patient:02d}-1": f"new-{patient:02d}" for patient in range(7)}
    change_table(runs[1] / "predictions.csv", lambda table: table.replace({"wsi_id": names}))
    text = (runs[1] / "splits.json").read_text()
    (runs[1] / "splits.json").write_text(re.sub(r"P0[0-6]-1", lambda found: names[found[0]], text))
    message = refusal(runs[0], runs[1])
    assert "7 slides in " in message
    assert f"{runs[0]} alone: P00-1, P01-1, P02-1, P03-1, P04-1 and 2 more" in message
    assert f"{runs[1]} alone: new-00" in refusal(runs[1], runs[0])


def test_a_slide_too_many(runs):
    change_table(runs[1] / "predictions.csv", lambda table: table[table["wsi_id"] != "P00-1"])
    text = (runs[1] / "splits.json").read_text()
    content = re.sub(r",(?=\s*\])", "", re.sub(r'"P00-1",?', "", text))
    (runs[1] / "splits.json").write_text(content)
    for pair in (runs[:2], runs[1::-1]):
        assert f"1 slide in {runs[0]} alone: P00-1; train both" in refusal(*pair)


def test_other_tests(runs):
    """Two patients of one class change folds, in predictions and splits."""
    swapped = {
        f"P{one}-{slide}": f"P{other}-{slide}" for one, other in (("00", "02"), ("02", "00")) for slide in (1, 2)
    }
    table, content = pd.read_csv(runs[1] / "predictions.csv"), json.loads((runs[1] / "splits.json").read_text())
    fold_of = {(row.wsi_id, row.repeat): row.fold for row in table.itertuples()}
    table["fold"] = [fold_of[swapped.get(row.wsi_id, row.wsi_id), row.repeat] for row in table.itertuples()]
    for fold in content["folds"]:
        fold["test"] = table["wsi_id"][table["fold"] == fold["fold"]].tolist()
    table.to_csv(runs[1] / "predictions.csv", index=False)
    write_json(runs[1] / "splits.json", content)
    first = min(fold_of["P00-1", 1], fold_of["P02-1", 1])
    message = refusal(runs[0], runs[1])
    assert f"the test part of fold {first}, inner 1 of splits.json differs in 4 slides: P00-1, P00-2, P02-1" in message
    assert f"train it with --splits {runs[0] / 'splits.json'}" in message


def test_other_inner_folds(runs):
    def swap(content: dict) -> None:
        inner = content["folds"][2]["inner"][1]
        inner["train"][0], inner["val"][0] = inner["val"][0], inner["train"][0]

    change_json(runs[1] / "splits.json", swap)
    assert "the train part of fold 3, inner 2 of splits.json differs in 2 slides" in refusal(runs[0], runs[1])
    change_json(runs[2] / "splits.json", lambda content: content["folds"][-1]["inner"].pop())
    assert "23 inner folds in all, there 24" in refusal(runs[0], runs[2])


def test_other_repeats(runs):
    change_json(runs[1] / "splits.json", lambda content: content["folds"][0].update(repeat=2))
    assert "fold 1, inner 1 of splits.json is of repeat 2, where" in refusal(runs[0], runs[1])


def test_metrics_that_cannot_be_compared(runs):
    message = refusal(*runs, metrics=("auc", "mcc"))
    assert message.startswith("--metrics mcc: unknown; these are: accuracy, ")
    assert "sensitivity_malignant" in message
    assert "--metrics auc: given twice" in refusal(*runs, metrics=("auc", "auc"))
    change_json(runs[2] / "outputs.json", lambda content: content["intervals_95"].pop("auc"))
    message = refusal(*runs, metrics=("auc",))
    assert str(runs[2]) in message
    assert "no pooled auc with its interval" in message


def test_the_report_and_its_files(runs, tmp_path, script):
    folder = tmp_path / "comparison"
    outcome = script("utils.compare", *runs, "--output_dir", folder)
    assert outcome.code == 0
    assert f"comparison.md, comparison.csv, comparison.png, roc.png are in {folder} (took " in outcome.out
    text = (folder / "comparison.md").read_text()
    assert outcome.out.startswith(text + "\n")
    assert len(re.findall(r"^\| \w+/mine - \w+/mine +\| patients ", text, re.MULTILINE)) == 9
    assert len(re.findall(r"^\| \w+/mine - \w+/mine +\| slides ", text, re.MULTILINE)) == 9
    for words in ("The figures of patients are primary", "of patients and of slides apart",
                  "48 slides of 24 patients", "8 folds", "trained on cohorts like this", "With --repeats 3 or more",
                  "the 3 pairs of auc and for the 6 tests of the other metrics", "auc is the primary"):  # fmt: skip
        assert words in text
    auc = read_runs(runs)[0].predictions.within_folds["auc"]
    low, high = auc.interval
    assert f"{auc.value:.3f} ({low:.3f} to {high:.3f})" in text
    assert re.search(r"\| LiteMIL/mine +\| patients \| meanPool \| +38,018 \|", text)
    table = pd.read_csv(folder / "comparison.csv")
    assert table.groupby("metric").size().to_dict() == {"auc": 6, "balanced_accuracy": 6, "f1_macro": 6}
    assert table["unit"].tolist() == ["patient"] * 9 + ["slide"] * 9
    assert table["is_primary"].tolist() == [True] * 9 + [False] * 9
    assert json.loads((folder / "comparison.json").read_text())["units"] == ["patient", "slide"]
    for name in ("comparison.png", "roc.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 600
    assert sorted(path.name for path in folder.iterdir()) == [
        "comparison.csv", "comparison.json", "comparison.md", "comparison.png", "roc.png",
    ]  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("coarse_figures")
def test_a_comparison_has_a_folder_that_is_called_after_its_runs(runs, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("outputs/LiteMIL/mine", "outputs/ABMIL/mine", "--metrics", "brier")
    assert script("utils.compare", *given).code == 0
    folder = Path("outputs/comparison/LiteMIL_mine_vs_ABMIL_mine")
    first = files(folder)
    assert script("utils.compare", *given[:1], "outputs/meanPool/mine", *given[2:]).code == 0
    again = script("utils.compare", *given)
    assert "moved" not in again.err
    assert files(folder) == first
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, "LiteMIL_mine_vs_meanPool_mine"]


def test_runs_that_differ_in_the_scale_of_their_features_are_warned_of(runs, tmp_path, script):
    where = (*runs[:2], "--metrics", "brier", "--output_dir", tmp_path / "comparison")
    with drawn_coarsely(blank=("png",)):
        assert "standardised" not in script("utils.compare", *where).err
        standardize = {"asked": "auto", "folds": [1]}
        change_json(runs[1] / "outputs.json", lambda content: content.update(standardize=standardize))
        told = "warning: features are standardised in ABMIL/mine and not in LiteMIL/mine: differences may be"
        assert told in script("utils.compare", *where).err


@pytest.mark.usefixtures("coarse_figures")
def test_another_comparison_in_the_folder_is_moved_aside_and_that_is_said(runs, tmp_path, script):
    folder = tmp_path / "comparison"
    where = ("--metrics", "brier", "--output_dir", folder)
    script("utils.compare", *runs[:2], *where)
    (folder / "mine.txt").write_text("the user's own")
    first = files(folder)
    cases = [
        ((*runs[1:], *where), "of LiteMIL/mine, ABMIL/mine"),
        ((*runs[1:], "--metrics", "ece", *where[2:]), "in brier"),
    ]
    for number, (given, reason) in enumerate(cases, start=1):
        outcome = script("utils.compare", *given)
        told = f"warning: {folder} held another comparison ({reason}); its files are now comparison.{number}.json, "
        assert f"{told}comparison.{number}.md" in outcome.err
    for name, content in first.items():
        stem, dot, suffix = name.partition(".")
        assert name == "mine.txt" or files(folder)[f"{stem}.1{dot}{suffix}"] == content
    change_json(runs[1] / "outputs.json", lambda content: content.update(model=SPEC | {"hidden_dim": 8}))
    assert "(the runs have changed since)" in script("utils.compare", *cases[1][0]).err
    (folder / "comparison.json").unlink()
    assert "(it does not say of which runs)" in script("utils.compare", *cases[1][0]).err
    assert (folder / "mine.txt").read_text() == "the user's own"
    assert (folder / "comparison.4.md").exists()
    assert not (folder / "comparison.4.json").exists()


@pytest.mark.usefixtures("coarse_figures")
def test_a_refused_comparison_moves_nothing(runs, tmp_path, script):
    folder = tmp_path / "comparison"
    script("utils.compare", *runs[:2], "--metrics", "brier", "--output_dir", folder)
    before = files(folder)
    assert script("utils.compare", *runs[1:], "--metrics", "mcc", "--output_dir", folder).code == 1
    assert files(folder) == before


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["LiteMIL/mine", "ABMIL/mine"], "LiteMIL_mine_vs_ABMIL_mine"),
        (["a b/ü", ".hidden", "x:y"], "a_b_ü_vs_hidden_vs_x_y"),
        (["x" * 300, "y"], f"{'x' * 50}_vs_1_other_"),
        ([f"model_{number}/mine" for number in range(12)], "model_0_mine_vs_11_others_"),
        (["ü" * 300, "y" * 300], f"{'ü' * 25}_vs_1_other_"),
    ],
)
def test_the_name_of_a_folder_is_plain_and_short(names, expected):
    found = folder_name(names)
    assert len(found.encode()) <= 100
    assert "/" not in found
    if expected.endswith("_"):
        assert re.fullmatch(f"{expected}[0-9a-f]{{8}}", found)
        assert folder_name([*names[:-1], "z"]) != found
    else:
        assert found == expected
    assert folder_name(names) == found


def test_the_roc_curves_of_several_runs_stand_in_one_figure(runs):
    found = read_runs(runs)
    figure = runs_roc_figure({run.name: run.predictions for run in found})
    (axes,) = figure.axes
    assert "positive: malignant" in axes.get_title()
    curves = [line for line in axes.lines if "/mine" in str(line.get_label())]
    assert len({line.get_color() for line in curves}) == len(curves) == 3
    for run, line in zip(found, curves, strict=True):
        auc, (low, high) = run.predictions.metrics["auc"], run.predictions.rankings[1].auc.interval
        assert line.get_label() == f"{run.name}: AUC {auc:.3f} ({low:.3f} to {high:.3f})"
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(auc)


@pytest.mark.parametrize("num_classes", [3, 7])
def test_of_more_classes_each_has_a_plot(num_classes, tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(42) % num_classes
    labels[labels == num_classes - 1] = 0  # a class without a slide
    answers = {
        name: Predictions(
            np.arange(42).astype(str), np.arange(42).astype(str), labels, rng.dirichlet(np.ones(num_classes), 42),
            Classification(tuple(f"class {k}" for k in range(num_classes))), np.ones(42), 0,
        )
        for name in ("$a$", "b")
    }  # fmt: skip
    figure = runs_roc_figure(answers)
    plots = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in plots] == [f"class {k}" for k in range(num_classes)]
    for axes in plots:
        assert [text.get_text().split(":")[0] for text in axes.get_legend().get_texts()] == [r"\$a\$", "b"]
    assert plots[-1].get_legend().get_texts()[1].get_text() == "b: AUC -"
    save_figure(figure, tmp_path / "roc.svg")


def test_two_runs_need_no_holm_and_a_refusal_writes_nothing(runs, tmp_path, script):
    folder = tmp_path / "comparison"
    outcome = script("utils.compare", *runs[:2], "--metrics", "brier", "--output_dir", folder)
    assert "Holm" not in outcome.out
    assert "brier (lower is better)" in outcome.out
    assert "primary metric" not in outcome.out
    before = (folder / "comparison.md").read_bytes()
    outcome = script("utils.compare", runs[0], tmp_path, "--output_dir", folder)
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert outcome.out == ""
    assert (folder / "comparison.md").read_bytes() == before


def test_parameters_of_a_model(runs, tmp_path):
    def parameters(run: Path) -> str:
        pair = read_runs([run, next(other for other in runs if other != run)])
        return report(pair, compare(pair, ["auc"])).splitlines()[4].split("|")[4].strip()

    def choose(content: dict) -> None:
        for fold, width in zip(content["fold_results"], [64, 256] * FOLDS, strict=True):
            fold["selection"]["setting"] = {"lr": 0.1, "hidden_dim": width}

    change_json(runs[0] / "outputs.json", lambda content: content.update(model=SPEC | {"hidden_dim": 128}))
    single = parameters(runs[0])
    change_json(runs[0] / "outputs.json", choose)
    several = parameters(runs[0])
    assert re.fullmatch(r"[\d,]+ to 38,018", several)
    least, single_count, most = (
        int(text.replace(",", "")) for text in (several.split()[0], single, several.split()[2])
    )
    assert least < single_count < most
    for model in (SPEC | {"name": "mine"}, SPEC | {"gone": 1}, None):
        change_json(runs[0] / "outputs.json", lambda content, model=model: content.update(model=model))
        assert parameters(runs[0]) == "-"


def test_the_figure_draws_each_difference(tmp_path):
    pairs = {("a", "b"): (0.1, -0.2, 0.3), ("a", "$c$"): (-0.05, -0.1, -0.01)}
    axes = comparison_figure({"auc": pairs, "brier": pairs}, "patient").axes[0]
    assert axes.get_xlabel().startswith("Difference of the patients' figures")
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == ["auc", "a\n- b", "a\n- \\$c\\$"]
    spans = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert spans == [(-0.2, 0.3), (-0.1, -0.01)] * 2 + [(0, 0)]
    assert [text.get_text() for text in axes.texts][:2] == ["+0.100 (-0.200 to +0.300)", "-0.050 (-0.100 to -0.010)"]
    top, bottom = axes.get_ylim()[::-1]
    assert all(top < line.get_ydata()[0] < bottom for line in axes.lines[:-1])
    for content in ({"auc": {("a", "b"): (0.1, -0.2, 0.3)}}, {}):
        save_figure(comparison_figure(content, "slide"), tmp_path / "figure.png")


@pytest.mark.usefixtures("coarse_figures")
def test_runs_of_train_py(tmp_path, script):
    labels, features = write_cohort(tmp_path / "cohort", patients_per_class=6, slides_per_patient=1, patches=(5, 8))
    given = ["--dataset", "toy", "--labels_csv", labels, "--features_dir", features, "--device", "cpu"]
    protocol = ["--n_outer", "2", "--n_inner", "2", "--epochs", "2", "--repeats", "2"]
    folders = [tmp_path / name for name in ("meanPool", "maxPool")]
    for folder in folders:
        assert script("train", "--mil", folder.name, *given, *protocol, "--output_dir", folder).code == 0
    outcome = script(
        "utils.compare", *folders, "--metrics", "auc", "ece", "specificity_benign", "--output_dir", tmp_path,
        "--figure_format", "pdf", "svg",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert {path.name for path in tmp_path.glob("*.*")} == {
        "comparison.md", "comparison.csv", "comparison.json", "comparison.pdf", "comparison.svg", "roc.pdf", "roc.svg",
    }  # fmt: skip
    run = read_run(folders[0], "meanPool")
    interval = json.loads((folders[0] / "outputs.json").read_text())["intervals_95"]["auc"]
    assert list(run.predictions.rankings[1].auc.interval) == pytest.approx(interval)
    assert "12 slides of 12 patients, tested in 4 folds" in outcome.out
    assert set(pd.read_csv(tmp_path / "comparison.csv")["unit"]) == {"slide"}
    assert "of patients" not in outcome.out.split("12 slides of 12 patients")[1]


def name_groups(run: Path, size: int) -> None:
    """Let so many neighbouring patients be a group."""
    number = lambda table: table["case_id"].str[1:].astype(int)  # noqa: E731
    change_table(run / "predictions.csv", lambda table: table.assign(group="G" + (number(table) // size).astype(str)))


def test_groups_that_one_run_names_count_for_both(runs):
    """A run of an earlier version does not name them, though its splits are the same."""
    (by_patient,) = of_slides(runs[:2], ["brier"])
    name_groups(runs[1], 2)
    (by_group,) = of_slides(runs[:2], ["brier"])
    assert by_group.difference == by_patient.difference
    assert by_group.low != by_patient.low
    name_groups(runs[0], 2)
    assert of_slides(runs[:2], ["brier"]) == [by_group]
    name_groups(runs[0], 3)
    assert "with another group" in refusal(*runs[:2])
