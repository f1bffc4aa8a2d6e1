"""Compare training runs on the same slides and splits, pair by pair: is one model better than another?

uv run python -m utils.compare outputs/LiteMIL/mine outputs/ABMIL/mine
uv run python -m utils.compare outputs/*/mine --metrics auc brier --output_dir outputs/comparison/mine
uv run python -m utils.compare outputs/*/mine --figure_format pdf svg
"""

from dataclasses import dataclass
from pathlib import Path

from utils.core import cli
from utils.core.errors import ConfigError
from utils.core.settings import REQUIRED, FigureFormat, Settings, figure_format_option, option


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """Which training runs `python -m utils.compare` compares, and by which metrics."""

    runs: tuple[Path, ...] = option(REQUIRED, "folders of finished training runs", metavar="RUN", positional=True)
    metrics: tuple[str, ...] = option(
        ("auc", "balanced_accuracy", "f1_macro"),
        "metrics to compare, the primary one first (default: auc balanced_accuracy f1_macro)",
        metavar="NAME",
    )
    output_dir: Path | None = option(
        None, "where the tables and the figures go (default: outputs/comparison/<run>_vs_<run>)"
    )
    figure_format: tuple[FigureFormat, ...] = figure_format_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) < 2:
            raise ConfigError(f"RUN: {len(self.runs)} given; give the folders of two finished runs or more")


_FLAGS = {"comparison": Comparison}
if __name__ == "__main__":
    cli.begin(str(__doc__), _FLAGS)

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from MILS import ModelError, build_mil, list_mils
from utils.core.errors import plural
from utils.core.files import digest, read_record, set_aside, write_json, write_records, write_text
from utils.core.plots import FORMATS, figure_paths, write_figures
from utils.core.runtime import derive_seed, log, progress
from utils.evaluation.comparison_figures import comparison_figure, runs_roc_figure
from utils.evaluation.paired_tests import holm, nadeau_bengio, paired_interval
from utils.evaluation.predictions import Predictions
from utils.learning.finished_runs import Run, read_runs

RESAMPLES = 5000
# With fewer patients, percentile intervals are too narrow.
_FEW_PATIENTS = 50
_FOLDER, _LONGEST_NAME = Path("outputs/comparison"), 100  # bytes
_RECORD, _TABLES, _FIGURES = "comparison.json", ("comparison.md", "comparison.csv"), ("comparison", "roc")


@dataclass(frozen=True)
class Difference:
    """`first - second` in one metric; None if undefined. `difference`, `low`, `high` (95% interval) and `p_bootstrap`
    are of the pooled slides, `fold_mean` and `p_corrected_t` of the `folds` in which both runs have the metric. The
    `_holm` p-values are adjusted for the number of pairs.
    """

    first: str
    second: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    p_bootstrap: float | None
    fold_mean: float | None
    folds: int
    p_corrected_t: float | None
    p_bootstrap_holm: float | None = None
    p_corrected_t_holm: float | None = None

    @property
    def pair(self) -> str:
        return f"{self.first} - {self.second}"


def main() -> None:
    (settings,) = cli.parse(str(__doc__), _FLAGS)
    runs = read_runs(settings.runs)
    check_metrics(runs, settings.metrics)
    _warn_of_scale(runs)
    differences = compare(runs, settings.metrics)
    text = report(runs, differences)
    folder = settings.output_dir or _FOLDER / folder_name([run.name for run in runs])
    record = _record(runs, settings.metrics)
    _set_aside_another(folder, record)
    write_json(folder / _RECORD, record)
    write_text(folder / _TABLES[0], text)
    write_records(folder / _TABLES[1], differences)
    figures = (
        comparison_figure(_intervals(differences, _titles(runs, settings.metrics))),
        runs_roc_figure({run.name: run.predictions for run in runs}),
    )
    paths = write_figures(folder, dict(zip(_FIGURES, figures, strict=True)), settings.figure_format)
    print(text)
    print(f"\n{', '.join([*_TABLES, *(path.name for path in paths)])} are in {folder} (took {cli.took()})")
    print("\nNext, a map of each slide by the model that did not see it:\n")
    print(f"  uv run predict.py --out_of_fold {settings.runs[0]} --wsi SLIDES_DIR --visualize")


def folder_name(names: Sequence[str]) -> str:
    """Return the name of the folder for a comparison of these runs, such as LiteMIL_mine_vs_ABMIL_mine.

    If that is too long, it is the first run's name, the number of the others, and a digest of all.
    """
    safe_names = [re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "run" for name in names]
    joined = "_vs_".join(safe_names)
    if len(joined.encode()) <= _LONGEST_NAME:
        return joined
    start = safe_names[0].encode()[: _LONGEST_NAME // 2].decode(errors="ignore")
    return f"{start}_vs_{plural(len(names) - 1, 'other').replace(' ', '_')}_{digest(*names)[:8]}"


def _record(runs: Sequence[Run], metrics: Sequence[str]) -> dict[str, Any]:
    """Return what identifies a comparison: the runs with a digest of their files, and the metrics."""
    files = "outputs.json", "predictions.csv", "splits.json"
    return {
        "runs": [
            {"name": run.name, "digest": digest(*((run.path / file).read_bytes() for file in files))} for run in runs
        ],
        "metrics": list(metrics),
    }


def _set_aside_another(folder: Path, record: dict[str, Any]) -> None:
    """Rename the files of another comparison and log it; files of the same comparison will be overwritten."""
    figures = [path for name in _FIGURES for path in figure_paths(folder / name, FORMATS)]
    existing = [path for path in (folder / _RECORD, *(folder / name for name in _TABLES), *figures) if path.exists()]
    earlier = read_record(folder / _RECORD)
    if not existing or earlier == record:
        return
    renamed = ", ".join(path.name for path in set_aside(*existing))
    log.warning("%s held another comparison (%s); its files are now %s", folder, _difference(earlier, record), renamed)


def _difference(earlier: dict[str, Any], record: dict[str, Any]) -> str:
    """Say how an earlier comparison differs from this one."""
    try:
        names, metrics = [run["name"] for run in earlier["runs"]], ", ".join(earlier["metrics"])
    except (KeyError, TypeError):
        return "it does not say of which runs"
    if names != [run["name"] for run in record["runs"]]:
        return f"of {', '.join(names)}"
    return f"in {metrics}" if earlier["metrics"] != record["metrics"] else "the runs have changed since"


def check_metrics(runs: Sequence[Run], metrics: Sequence[str]) -> None:
    """Raise ConfigError for a metric that is unknown, given twice, or different in a run's outputs and predictions."""
    names = runs[0].predictions.task.metric_names
    for metric in metrics:
        if metric not in names:
            raise ConfigError(f"--metrics {metric}: unknown; these are: {', '.join(names)}")
        if metrics.count(metric) > 1:
            raise ConfigError(f"--metrics {metric}: given twice; name each once")
    for run in runs:
        computed = run.predictions.metrics
        for metric in metrics:
            value, _ = run.reported(metric)
            if (value is None) != (computed[metric] is None) or abs((value or 0) - (computed[metric] or 0)) > 1e-6:
                raise ConfigError(
                    f"{run.path}: {metric} is {_figure(value)} in outputs.json and {_figure(computed[metric])} by "
                    "predictions.csv; one of them was changed, so train the run again"
                )


def _warn_of_scale(runs: Sequence[Run]) -> None:
    """Warn if some runs standardise features and others do not: the scale of features may explain a difference."""
    standardize = {run.name: bool((run.outputs.get("standardize") or {}).get("folds")) for run in runs}
    if len(set(standardize.values())) > 1:
        names = [", ".join(name for name, used in standardize.items() if used is value) for value in (True, False)]
        log.warning(
            "features are standardised in %s and not in %s: differences may be those of the features' scale, not the "
            "models'; train all with one --standardize", *names,
        )  # fmt: skip


def compare(runs: Sequence[Run], metrics: Sequence[str], resamples: int = RESAMPLES) -> list[Difference]:
    """Compare every pair of runs in every metric, in the order of `metrics`.

    The result for a pair does not depend on the other runs, except for the `_holm` p-values.
    """
    pooled = [run.predictions.metrics for run in runs]
    folds, sizes = [_fold_metrics(run.predictions) for run in runs], _fold_sizes(runs[0])
    draws = [
        run.predictions.draws(derive_seed("comparison"), resamples)
        for run in progress(runs, "Resampling patients", unit="run")
    ]
    differences = []
    for metric in metrics:
        pairs = [
            Difference(
                runs[a].name,
                runs[b].name,
                metric,
                _minus(pooled[a][metric], pooled[b][metric]),
                *(paired_interval(draws[a][metric], draws[b][metric]) or (None, None, None)),
                *_over_folds([fold[metric] for fold in folds[a]], [fold[metric] for fold in folds[b]], sizes),
            )
            for a, b in combinations(range(len(runs)), 2)
        ]
        differences += _adjusted(pairs)
    return differences


def _minus(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _fold_metrics(predictions: Predictions) -> list[dict[str, float | None]]:
    folds = predictions.folds
    assert folds is not None  # noqa: S101 - for the type checker: a run's predictions have folds
    return [predictions.where(folds == fold).metrics for fold in np.unique(folds)]


def _fold_sizes(run: Run) -> list[tuple[int, int]]:
    """Return how many slides each outer fold was trained on, with inner validation, and tested on."""
    trained: dict[int, set[str]] = {}
    tested = {split.fold: len(set(split.slides["test"])) for split in run.splits}
    for split in run.splits:
        trained.setdefault(split.fold, set()).update(split.slides["train"], split.slides["val"])
    return [(len(trained[fold]), tested[fold]) for fold in sorted(tested)]


def _over_folds(
    first: Sequence[float | None], second: Sequence[float | None], sizes: Sequence[tuple[int, int]]
) -> tuple[float | None, int, float | None]:
    """Return the mean difference over the folds where both are defined, their number, and the corrected t test's p."""
    pairs = [(a - b, *size) for a, b, size in zip(first, second, sizes, strict=True) if a is not None and b is not None]
    if not pairs:
        return None, 0, None
    differences, n_train, n_test = zip(*pairs, strict=True)
    t_and_p = nadeau_bengio(differences, n_train, n_test)
    return float(np.mean(differences)), len(pairs), t_and_p and t_and_p[1]


def _adjusted(pairs: Sequence[Difference]) -> list[Difference]:
    bootstrap, corrected = holm([pair.p_bootstrap for pair in pairs]), holm([pair.p_corrected_t for pair in pairs])
    return [
        replace(pair, p_bootstrap_holm=p, p_corrected_t_holm=q)
        for pair, p, q in zip(pairs, bootstrap, corrected, strict=True)
    ]


def report(runs: Sequence[Run], differences: Sequence[Difference]) -> str:
    """Return a report in Markdown: the runs, their differences, and how to read them."""
    titles = _titles(runs, list(dict.fromkeys(difference.metric for difference in differences)))
    sections = [
        f"# {len(runs)} training runs compared",
        _runs_table(runs, titles),
        "## Differences",
        _differences_table(differences, titles, are_many=len(runs) > 2),
        "## How to read this",
        _reading(runs[0], differences, list(titles), are_many=len(runs) > 2),
    ]
    return "\n\n".join(sections) + "\n"


def _runs_table(runs: Sequence[Run], titles: Mapping[str, str]) -> str:
    rows = [["run", "model", "parameters", *[f"{title}, 95% CI" for title in titles.values()]]]
    for run in runs:
        model = run.outputs.get("model")
        name = model.get("name") if isinstance(model, dict) else None
        cells = []
        for metric in titles:
            value, interval = run.reported(metric)
            cells.append(f"{_figure(value)} ({_range(interval)})")
        rows.append([run.name, name or "-", _parameters(run) if name in list_mils() else "-", *cells])
    return _table(rows, texts=2)


def _parameters(run: Run) -> str:
    """Return the number of weights of the run's models; the range if the folds chose models of several sizes."""
    spec = run.outputs["model"]
    try:
        settings = [fold["selection"].get("setting", {}) for fold in run.outputs["fold_results"]]
        specs = [spec | {name: value for name, value in setting.items() if name in spec} for setting in settings]
        counts = {sum(weights.numel() for weights in build_mil(**fold_spec).parameters()) for fold_spec in specs}
    except (ModelError, KeyError, TypeError, AttributeError):  # a model of another version
        return "-"
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) if counts else "-"


def _differences_table(differences: Sequence[Difference], titles: Mapping[str, str], are_many: bool) -> str:
    header = ["pair", "metric", "difference", "95% CI", "p (bootstrap)"]
    header += ["Holm"] if are_many else []
    header += ["mean over folds", "p (corrected t)"]
    header += ["Holm"] if are_many else []
    rows = [header]
    for pair in differences:
        interval = None if pair.low is None or pair.high is None else (pair.low, pair.high)
        row = [pair.pair, titles[pair.metric], _figure(pair.difference, "+"), _range(interval, "+")]
        row += [_p(pair.p_bootstrap), *([_p(pair.p_bootstrap_holm)] if are_many else [])]
        row += [_figure(pair.fold_mean, "+"), _p(pair.p_corrected_t)]
        row += [_p(pair.p_corrected_t_holm)] if are_many else []
        rows.append(row)
    return _table(rows, texts=2)


def _reading(run: Run, differences: Sequence[Difference], metrics: Sequence[str], are_many: bool) -> str:
    slides, patients, folds = run.predictions.n_slides, run.predictions.n_cases, run.predictions.n_folds
    primary = (
        f"{metrics[0]} is the primary metric, as the first one named; no p is corrected for the number of metrics."
        if len(metrics) > 1
        else ""
    )
    pairs = f"Holm: corrected for the {len(differences) // len(metrics)} pairs within a metric." if are_many else ""
    few = (
        "With so few patients the intervals are wide, and still rather too narrow." if patients < _FEW_PATIENTS else ""
    )
    items = [
        [
            f"{plural(slides, 'slide')} of {plural(patients, 'patient')}, tested in {plural(folds, 'fold')}.",
            "A difference is the first run's metric minus the second's, over all tested slides.",
            primary,
            pairs,
        ],
        [
            f"CI and p (bootstrap): patients were resampled {RESAMPLES} times, the same ones for all runs. Both are "
            "conditional on the trained models: they cover other patients, not other trainings.",
            few,
        ],
        [
            "p (corrected t): whether the mean over folds would hold for other trainings (Nadeau and Bengio 2003, the "
            'corrected resampled t test); "-" if fewer than two folds define it, or all differ by the same. That mean '
            "can differ from the difference over all slides, which ranks the slides of several folds together.",
        ],
        [
            "A large p does not show that two models are equally good: the interval gives the differences that are "
            "compatible with these patients.",
        ],
    ]
    return "\n".join("- " + " ".join(filter(None, item)) for item in items)


def _intervals(
    differences: Sequence[Difference], titles: Mapping[str, str]
) -> dict[str, dict[tuple[str, str], tuple[float, float, float]]]:
    """Return the difference and its interval by metric and pair, where both are defined."""
    intervals: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {}
    for pair in differences:
        if pair.difference is not None and pair.low is not None and pair.high is not None:
            pairs = intervals.setdefault(titles[pair.metric], {})
            pairs[pair.first, pair.second] = (pair.difference, pair.low, pair.high)
    return intervals


def _titles(runs: Sequence[Run], metrics: Sequence[str]) -> dict[str, str]:
    """Return the names of the metrics in tables and figures."""
    lower_is_better = runs[0].predictions.task.lower_is_better
    return {
        metric: metric.replace("_", " ") + (" (lower is better)" if metric in lower_is_better else "")
        for metric in metrics
    }


def _figure(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}z.3f}"


def _range(interval: Sequence[float] | None, sign: str = "") -> str:
    return "-" if interval is None else f"{interval[0]:{sign}z.3f} to {interval[1]:{sign}z.3f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"


def _table(rows: Sequence[Sequence[str]], texts: int) -> str:
    """Return a Markdown table that is aligned as plain text too; the first row is its head, the first `texts` columns
    hold text, the others numbers.
    """
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    columns = []
    for number, column in enumerate(zip(*escaped, strict=True)):
        width, is_text = max(map(len, column)), number < texts
        head, *cells = [cell.ljust(width) if is_text else cell.rjust(width) for cell in column]
        columns.append([head, "-" * width if is_text else "-" * (width - 1) + ":", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


if __name__ == "__main__":
    cli.run(main)
