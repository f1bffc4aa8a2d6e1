"""Score maps against annotated patches: does a map rank the patches of a class first?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.core.errors import plural
from utils.core.text import figure_text, interval_text
from utils.evaluation.intervals import mean_interval

SCORES = ("auc", "pointing", "overlap")


def map_scores(values: np.ndarray, is_inside: np.ndarray) -> dict[str, float | None]:
    """Return how well a map's `values (N,)` rank the patches of a class, `is_inside (N,)` bool, above the others.

    `auc`: how often a patch of the class has the greater value of the two, ties counted half. `pointing`: 1 if the
    patch of the greatest value is of the class, else 0 (of tied patches the share that is). `overlap`: of the n patches
    with the greatest values, the share of the class, where n is the number of patches of the class; tied patches count
    by their share. All are None unless there are patches of the class and others.
    """
    count = int(is_inside.sum())
    if not 0 < count < len(values):
        return dict.fromkeys(SCORES)
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True)) + 1  # of each run of tied patches
    sizes, hits = np.diff(ends, prepend=0), np.diff(is_inside[order].cumsum()[ends - 1], prepend=0)
    misses = sizes - hits
    above = np.cumsum(hits) - hits  # patches of the class with greater values
    auc = float((misses * (above + hits / 2)).sum()) / (count * (len(values) - count))
    top_counts = np.clip(count - (ends - sizes), 0, sizes)  # of each run, its patches among the first `count`
    overlap = float((hits * top_counts / sizes).sum()) / count
    return {"auc": auc, "pointing": float(hits[0] / sizes[0]), "overlap": overlap}


def mean_scores(entries: Sequence[Mapping[str, Any]], cases: Sequence[str], seed: int) -> dict[str, Any]:
    """Return, for each class, the mean of the slides' scores with 95% intervals over patients, as in `scores.json`.

    `entries` are the slides' `localization` entries, `cases` their patients. Slides without patches of a class, or
    without others, do not count for it.
    """
    classes = list(dict.fromkeys(name for entry in entries for name in entry["classes"]))
    return {name: _class_means(name, entries, np.array(cases), seed) for name in classes}


def _class_means(name: str, entries: Sequence[Mapping[str, Any]], cases: np.ndarray, seed: int) -> dict[str, Any]:
    by_slide = [entry["classes"].get(name, {}) for entry in entries]
    is_scored = np.array([bool(scores) and scores["attention"]["auc"] is not None for scores in by_slide])
    scored = [scores for scores, counts in zip(by_slide, is_scored, strict=True) if counts]
    means: dict[str, Any] = {"n_slides": len(scored), "n_cases": len(np.unique(cases[is_scored]))}
    if scored:
        means["chance_overlap"] = float(np.mean([scores["patches"] / scores["of"] for scores in scored]))
    for kind in ("attention", "evidence"):
        if scored and all(scores.get(kind) for scores in scored):
            values = {name: np.array([scores[kind][name] for scores in scored]) for name in SCORES}
            intervals = {name: mean_interval(values[name], cases[is_scored], seed) for name in SCORES}
            means[kind] = {name: float(values[name].mean()) for name in SCORES} | {"intervals_95": intervals}
    return means


def means_text(means: Mapping[str, Any]) -> list[str]:
    """Return the sentences on the `localization` of a `scores.json`."""
    sentences = []
    for name, class_means in means.items():
        if not class_means["n_slides"]:
            sentences.append(f"Annotated {name}: no slide has patches of it and others, so no map is scored.")
            continue
        maps = [_means_of_map(kind, class_means[kind]) for kind in ("attention", "evidence") if kind in class_means]
        sentences.append(
            f"Annotated {name}, mean of {plural(class_means['n_slides'], 'slide')} (chance: AUC 0.5, overlap "
            f"{figure_text(class_means['chance_overlap'])}): {'; '.join(maps)}."
        )
    return sentences


def _means_of_map(kind: str, means: Mapping[str, Any]) -> str:
    auc = f"{figure_text(means['auc'])} (95% CI {interval_text(means['intervals_95']['auc'])})"
    return f"{kind} AUC {auc}, top patch in it {means['pointing']:.0%}, overlap {figure_text(means['overlap'])}"
