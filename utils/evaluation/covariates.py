"""Figures of covariates alone, slides alone and both, and their differences, in `outputs.json` and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from utils.core.text import aligned, figure_text, interval_text, p_text, range_text
from utils.evaluation.comparison import compare
from utils.evaluation.outputs import figures_of
from utils.evaluation.predictions import Predictions
from utils.tasks.records import task_of


def covariate_figures(
    runs: Mapping[str, Predictions], columns: Sequence[Mapping[str, Any]], sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return the entry of `outputs.json`: the columns, and the patients' figures and differences of the `runs`, by what
    their models see. `sizes` are the numbers of patients that each fold was trained and tested on.
    """
    by_case = {name: run.by_case() for name, run in runs.items()}
    metrics = next(iter(by_case.values())).task.compared_metrics
    return {
        "columns": list(columns),
        "models": {name: figures_of(run) for name, run in by_case.items()},
        "differences": [asdict(difference) for difference in compare(by_case, sizes, metrics)],
    }


def covariates_text(results: Mapping[str, Any]) -> str:
    """Return the table of the primary metric of an `outputs.json`, with its title; "" if it has no covariates."""
    content = results.get("covariates")
    if not content:
        return ""
    metric = task_of(results).compared_metrics[0]
    columns = [
        f"{column['name']} (unknown for {column['missing']})" if column["missing"] else column["name"]
        for column in content["columns"]
    ]
    rows = [
        [name, figure_text(value), interval_text(interval), ""]
        for name, figures in content["models"].items()
        for value, interval in [reported(figures, metric)]
    ]
    differences = [
        [
            f"{pair['first']} - {pair['second']}",
            figure_text(pair["difference"], "+"),
            range_text(None if pair["low"] is None else (pair["low"], pair["high"]), "+"),
            p_text(pair["p"]),
        ]
        for pair in content["differences"]
        if pair["metric"] == metric
    ]
    head = [["", metric.replace("_", " "), "95% CI", "p"]]
    title = f"Covariates {', '.join(columns)}: patients' figures, out of fold"
    note = "Intervals and p of differences are of the algorithms, trained on cohorts like this one."
    return f"{title}\n\n{aligned([head, rows, differences])}\n\n{note}"


def reported(figures: Mapping[str, Any], metric: str) -> tuple[float | None, Sequence[float] | None]:
    """Return a metric of `outputs.figures_of` with its 95% interval: within folds if it is defined there."""
    if figures["within_folds"].get(metric) is not None:
        return figures["within_folds"][metric], figures["within_folds_intervals_95"][metric]
    return figures["pooled"][metric], figures["intervals_95"][metric]
