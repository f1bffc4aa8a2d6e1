"""What is printed when a cross-validation ends."""

import pytest

from tests.evaluation.predicted import predicted
from utils.evaluation.closing_table import closing_text, level_words, results_table
from utils.evaluation.outputs import NO_PATIENTS, outputs_content

PATIENTS = ["patients", "95%", "within", "95%"]


def closed(folds: int = 3, patients_from: str | None = "the column case_id") -> dict:
    """The content of an `outputs.json`."""
    predictions = predicted(patients=2 * max(folds, 6), folds=folds)
    figures = []
    for number in range(1, folds + 1):
        part = predictions.where(predictions.folds == number)
        slide = predictions.task.unweighted_metrics(part.labels, part.values)
        selection = {"setting": {}, "settings": [{"setting": {}}]}
        figures.append({"fold": number, "chunk": slide, "slide": slide, "thresholded": None, "selection": selection})
    return outputs_content(predictions, figures, patients_from)


@pytest.fixture(scope="module")
def results() -> dict:
    return closed()


def names_of(table: str) -> list[str]:
    return [line.split()[0] for line in table.splitlines() if "---" not in line][1:]


def test_the_closing_table(results):
    table = results_table(results)
    assert len({len(line) for line in table.splitlines()}) == 1
    assert names_of(table) == ["fold", "fold", "fold", "mean", "std", "pooled", "95%", "within", "95%", *PATIENTS]
    for name in ("slide_auc_mean", "slide_accuracy_mean", "slide_auc_std"):
        assert f"{results[name]:.3f}" in table


def test_many_folds_are_left_to_the_file():
    assert names_of(results_table(closed(folds=20))).count("fold") == 20
    assert names_of(results_table(closed(folds=21))) == ["mean", "std", "pooled", "95%", "within", "95%", *PATIENTS]


def test_a_figure_that_some_folds_lack_says_how_many_have_it(results):
    folds = [dict(fold) for fold in results["fold_results"]]
    folds[1]["slide"] = folds[1]["slide"] | {"auc": None}
    table = results_table(results | {"fold_results": folds, "slide_auc_folds": 2})
    assert names_of(table) == [
        "fold",
        "fold",
        "fold",
        "mean",
        "std",
        "folds",
        "pooled",
        "95%",
        "within",
        "95%",
        *PATIENTS,
    ]
    (line,) = [line for line in table.splitlines() if line.split()[:1] == ["folds"]]
    assert sorted(set(line.split()[1:])) == ["2", "3"]
    assert line.split().count("2") == 1


def test_sensitivity_and_specificity_of_each_class_close_the_run(results):
    for name in ("no", "yes"):
        (line,) = [line for line in closing_text(results).splitlines() if line.split()[:1] == [name]]
        for kind in ("sensitivity", "specificity"):
            low, high = results["cases"]["intervals_95"][f"{kind}_{name}"]
            assert f"{results['cases']['pooled'][f'{kind}_{name}']:.3f}" in line
            assert f"{low:.3f}-{high:.3f}" in line


@pytest.mark.parametrize("unit", ["slide", "patient"])
@pytest.mark.parametrize(("pooled", "is_explained"), [(0.96, True), (0.995, False)])
def test_the_auc_within_folds_is_named_and_a_pooled_one_that_differs_is_explained(results, unit, pooled, is_explained):
    within = results["within_folds"] | {"auc": 1.0}
    words = closing_text(
        results
        | {"cases": None, "primary_unit": unit, "within_folds": within, "pooled": results["pooled"] | {"auc": pooled}}
    )
    assert f"The AUC to report is 1.000: it ranks each fold's {unit}s by that fold's own model." in words
    assert (f"The pooled 0.960 ranks all {unit}s together" in words) is is_explained


def test_an_interval_that_is_missing_has_its_reason(results):
    assert "None for ece: by chance alone it is above 0." in closing_text(results)
    methods = dict.fromkeys(results["interval_methods"], "none: fewer than 5 patients")
    assert "No 95% intervals: fewer than 5 patients." in closing_text(results | {"interval_methods": methods})


def test_unknown_patients_are_mentioned(results):
    assert "No patients are known" not in closing_text(results)
    assert "No patients are known" in closing_text(results | {"patients_from": NO_PATIENTS})


def test_repeats_and_chosen_settings_are_mentioned(results):
    words = closing_text(results)
    assert "\n24 slides of 12 patients, tested once. The 95% intervals cover other patients" in words
    assert "Chosen in the inner loop" not in words
    settings = [{"lr": 0.1}, {"lr": 0.01}, {"lr": 0.01}]
    folds = [
        fold | {"selection": {"setting": setting, "settings": [{}, {}]}}
        for fold, setting in zip(results["fold_results"], settings, strict=True)
    ]
    words = closing_text(results | {"n_repeats": 2, "fold_results": folds})
    assert "tested once in each of 2 repeats (pooled: the repeats' mean)" in words
    assert "Chosen in the inner loop: lr=0.01 in 2 of 3 folds; lr=0.1 in 1 of 3 folds." in words


def test_results_of_an_earlier_version_say_so(results):
    earlier = {name: value for name, value in results.items() if name not in ("interval_methods", "calibration")}
    assert "The 95% intervals are of an earlier version" in closing_text(earlier)


def test_patients_of_several_slides_are_the_ones_to_report(results):
    text, cases = closing_text(results), results["cases"]
    assert "Report the figures of patients: 12 patients of 12 have several slides, whose answers are averaged." in text
    assert f"The AUC to report is {cases['within_folds']['auc']:.3f}" in text
    assert level_words(results) == "slides and patients"
    assert level_words(results | {"cases": None, "primary_unit": "patient"}) == "patient level"
    assert level_words({**results, "cases": None, "primary_unit": None}) == "slide level", "of an earlier version"
    alone = closing_text(results | {"cases": None})
    assert "Report the figures of patients" not in alone
    assert f"The AUC to report is {results['within_folds']['auc']:.3f}" in alone
