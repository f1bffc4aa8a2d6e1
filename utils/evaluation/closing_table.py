"""The closing table of a cross-validation, and the text printed with it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from utils.core.errors import first_few, plural
from utils.core.text import aligned, figure_text, interval_text
from utils.evaluation.covariates import covariates_text
from utils.evaluation.outputs import NO_PATIENTS
from utils.evaluation.reliability import reliability_words
from utils.evaluation.subgroups import subgroups_text
from utils.tasks.records import task_of

# With more folds, the closing table leaves them to outputs.json.
_MOST_FOLDS = 20
_NONE = "none: "


def results_table(results: dict[str, Any]) -> str:
    """Return the closing table: each fold, their mean and standard deviation, the pooled metrics with intervals."""
    metrics = task_of(results).main_metrics
    folds = results["fold_results"] if len(results["fold_results"]) <= _MOST_FOLDS else []
    fold_rows = [figures_row(f"fold {fold['fold']}", fold["slide"], metrics) for fold in folds]
    counts = [results[f"slide_{name}_folds"] for name in metrics]
    summary = [
        ["mean", *[figure_text(results[f"slide_{name}_mean"]) for name in metrics]],
        ["std", *[figure_text(results[f"slide_{name}_std"]) for name in metrics]],
    ]
    if min(counts) < results["n_folds"]:
        summary.append(["folds", *map(str, counts)])
    pooled = [figures_row("pooled", results["pooled"], metrics), intervals_row(results["intervals_95"], metrics)]
    if results.get("within_folds"):
        pooled.append(figures_row("within folds", results["within_folds"], metrics))
        pooled.append(intervals_row(results["within_folds_intervals_95"], metrics))
    return text_table([fold_rows, summary, pooled, case_rows(results, metrics)], metrics)


def case_rows(results: Mapping[str, Any], metrics: Sequence[str], name: str = "patients") -> list[list[str]]:
    """Return the rows, of this name, of the patients' figures of an `outputs.json` or `scores.json`, if it has some."""
    cases = results.get("cases")
    if not cases:
        return []
    rows = [figures_row(name, cases["pooled"], metrics), intervals_row(cases["intervals_95"], metrics)]
    if cases.get("within_folds"):
        rows.append(figures_row("within folds", cases["within_folds"], metrics))
        rows.append(intervals_row(cases["within_folds_intervals_95"], metrics))
    return rows


def primary_figures(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content with the patients' figures in place of the slides', where there are some."""
    return {**results, **(results.get("cases") or {})}


def case_words(results: Mapping[str, Any]) -> str:
    """Return that the patients' figures are the ones to report; "" if there are none."""
    cases = results.get("cases")
    if not cases:
        return ""
    return (
        f"Report the figures of patients: {plural(cases['n_several_slides'], 'patient')} of {results['n_cases']} "
        f"{'has' if cases['n_several_slides'] == 1 else 'have'} several slides, whose answers are averaged."
    )


def level_words(results: Mapping[str, Any]) -> str:
    """Return what the rows of the closing table are of."""
    unit = results.get("primary_unit") or task_of(results).unit  # an earlier version's files lack it
    return "slides and patients" if results.get("cases") else f"{unit} level"


def figures_row(name: str, figures: Mapping[str, float | None], metrics: Sequence[str]) -> list[str]:
    """Return a row of the closing table: a name, then the `metrics`; blank for one that `figures` lack."""
    return [name, *[figure_text(figures[metric]) if metric in figures else "" for metric in metrics]]


def intervals_row(intervals: Mapping[str, Sequence[float] | None], metrics: Sequence[str]) -> list[str]:
    """Return the row of the 95% intervals; blank for a metric that `intervals` lack."""
    return ["95% CI", *[interval_text(intervals[metric]) if metric in intervals else "" for metric in metrics]]


def interval_words(results: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Return what the 95% intervals of an `outputs.json` or `scores.json` cover, and why those of some `metrics` are
    missing ("-").
    """
    methods = results.get("interval_methods")
    if methods is None:
        return "The 95% intervals are of an earlier version: percentiles of resampled patients."
    if all(method.startswith(_NONE) for method in methods.values()):
        reasons = dict.fromkeys(method.removeprefix(_NONE) for method in methods.values())
        return f"No 95% intervals: {next(iter(reasons))}."
    missing: dict[str, list[str]] = {}
    for metric in metrics:
        if methods[metric].startswith(_NONE) and results["pooled"][metric] is not None:
            missing.setdefault(methods[metric].removeprefix(_NONE), []).append(metric.replace("_", " "))
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in missing.items())
    groups = results.get("n_groups")  # an earlier version's files lack it
    units = "patients" if groups is None else f"groups of patients ({groups} are known here)"
    words = f"The 95% intervals cover other {units}, not other trainings; interval_methods names the method of each."
    return f"{words} None for {reasons}." if reasons else words


def text_table(blocks: Sequence[Sequence[Sequence[str]]], metrics: Sequence[str]) -> str:
    """Return blocks of such rows under the names of the `metrics`, with a rule between blocks."""
    return aligned([[["", *[name.replace("_", " ") for name in metrics]]], *filter(None, blocks)])


def closing_text(results: dict[str, Any]) -> str:
    """Return the closing table, followed by sentences on how to read it."""
    bags = ", each patient's as one bag" if results.get("unit") == "case" else ""
    about = f"{plural(results['n_slides'], 'slide')} of {plural(results['n_cases'], 'patient')}{bags}, tested once"
    if results["n_repeats"] > 1:
        about += f" in each of {results['n_repeats']} repeats (pooled: the repeats' mean)"
    task = task_of(results)
    sentences = [f"{about}. {interval_words(results, task.main_metrics)}", *filter(None, [case_words(results)])]
    if results.get("patients_from") == NO_PATIENTS:
        sentences.append("No patients are known: where some have several slides, every figure above is too good.")
    sentences += [
        *task.closing_sentences(primary_figures(results)),
        *filter(None, [reliability_words(results.get("calibration", {}))]),
    ]
    sentences += _changed_words(results)
    settings = Counter(_setting_text(fold["selection"]["setting"]) for fold in results["fold_results"])
    if len(results["fold_results"][0]["selection"]["settings"]) > 1:
        choices = [f"{setting} in {count} of {results['n_folds']} folds" for setting, count in settings.most_common()]
        sentences.append(f"Chosen in the inner loop: {'; '.join(choices)}.")
    figures = primary_figures(results)
    table = task.table(figures["pooled"], figures["intervals_95"])
    described = [f"\n{text}" for text in (covariates_text(results), subgroups_text(results)) if text]
    return "\n".join([results_table(results), "", *([table, ""] if table else []), *sentences, *described])


def _changed_words(results: Mapping[str, Any]) -> list[str]:
    """Return in which folds the loss chose instead of the metric that was asked for, and why."""
    folds_of: dict[str, list[str]] = {}
    for fold, text in (results.get("changed_monitors") or {}).items():
        folds_of.setdefault(text, []).append(str(fold))
    return [
        f"In {len(folds)} of {results['n_folds']} folds ({first_few(folds)}) {text}."
        for text, folds in folds_of.items()
    ]


def _setting_text(setting: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.items())
