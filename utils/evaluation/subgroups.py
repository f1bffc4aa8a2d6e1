"""Figures of groups of slides, such as those of women and of men, in `outputs.json` or `scores.json` and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.core.text import aligned, figure_text, interval_text
from utils.evaluation.covariates import reported
from utils.evaluation.outputs import figures_of, methods
from utils.evaluation.predictions import Predictions
from utils.tasks.records import task_of

if TYPE_CHECKING:
    import pandas as pd

Groups = Mapping[str, Mapping[str, Mapping[str, Any]]]  # the figures by column and group


def subgroup_figures(predictions: Predictions, groups: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Return the patients' figures of each group by column, given the rows `(n,)` bool of each group by column. A group
    that has no row is left out.
    """
    return {
        column: {name: _figures(predictions.where(rows)) for name, rows in rows_of.items() if rows.any()}
        for column, rows_of in groups.items()
    }


def _figures(predictions: Predictions) -> dict[str, Any]:
    by_case = predictions.by_case()
    return {
        "n_slides": predictions.n_slides if predictions.unit == "slide" else None,
        "n_cases": predictions.n_cases,
        **figures_of(by_case),
        "interval_methods": methods(by_case.reported_estimates),
    }


def subgroup_table(content: Groups) -> pd.DataFrame:
    """Return a row for each column, group and metric."""
    import pandas as pd

    rows = []
    for column, groups in content.items():
        for group, figures in groups.items():
            head = {"column": column, "group": group, "patients": figures["n_cases"]}
            head |= {} if figures["n_slides"] is None else {"slides": figures["n_slides"]}
            for metric in figures["pooled"]:
                value, interval = reported(figures, metric)
                low, high = interval or (None, None)
                about = {"value": value, "low": low, "high": high, "method": figures["interval_methods"][metric]}
                rows.append(head | {"metric": metric} | about)
    return pd.DataFrame(rows)


def subgroups_text(results: Mapping[str, Any]) -> str:
    """Return the table of the primary metric by group of an `outputs.json` or `scores.json`, with the reason where a
    figure or an interval is missing; "" if it has no subgroups.
    """
    content: Groups | None = results.get("subgroups")
    if not content:
        return ""
    metric = task_of(results).compared_metrics[0]
    blocks, reasons = [], {}
    of_slides = any(figures["n_slides"] is not None for groups in content.values() for figures in groups.values())
    for column, groups in content.items():
        rows = []
        for group, figures in groups.items():
            value, interval = reported(figures, metric)
            counts = [str(figures["n_cases"]), *([str(figures["n_slides"])] if of_slides else [])]
            rows.append([f"{column}: {group}", *counts, figure_text(value), interval_text(interval)])
            if interval is None:
                reasons[figures["interval_methods"][metric].removeprefix("none: ")] = None
        blocks.append(rows)
    head = [["subgroup", "patients", *(["slides"] if of_slides else []), metric.replace("_", " "), "95% CI"]]
    why = f"\n-: {'; '.join(reasons)}" if reasons else ""
    return f"{aligned([head, *blocks])}{why}"
