"""Is one model better than another? Training runs on the same slides and splits, compared pair by pair.

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
    """Which training runs `python -m utils.compare` compares, and in what."""

    runs: tuple[Path, ...] = option(REQUIRED, "folders of finished training runs", metavar="RUN", positional=True)
    metrics: tuple[str, ...] = option(
        ("auc", "balanced_accuracy", "f1_macro"),
        "figures to compare, the primary one first (default: auc balanced_accuracy f1_macro)",
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
from utils.evaluation.paired import holm, nadeau_bengio, paired_interval
from utils.evaluation.predictions import Predictions
from utils.learning.finished_runs import Run, read_runs

RESAMPLES = 5000
# With fewer patients, percentile intervals are known to be too narrow.
_FEW_PATIENTS = 50
_FOLDER, _LONGEST_NAME = Path("outputs/comparison"), 100  # bytes
_RECORD, _TABLES, _FIGURES = "comparison.json", ("comparison.md", "comparison.csv"), ("comparison", "roc")


@dataclass(frozen=True)
class Difference:
    """`first - second` in one metric; None where undefined. `difference`, `low`, `high` (95% interval) and
    `p_bootstrap` are of the pooled slides, `fold_mean` and `p_corrected_t` of the `folds` where both are defined.
    The `_holm` p's are adjusted for the pairs.
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
    _make_way(folder, record)
    write_json(folder / _RECORD, record)
    write_text(folder / _TABLES[0], text)
    write_records(folder / _TABLES[1], differences)
    drawn = (
        comparison_figure(_intervals(differences, _titles(runs, settings.metrics))),
        runs_roc_figure({run.name: run.predictions for run in runs}),
    )
    figures = write_figures(folder, dict(zip(_FIGURES, drawn, strict=True)), settings.figure_format)
    print(text)
    print(f"\n{', '.join([*_TABLES, *(path.name for path in figures)])} are in {folder} (took {cli.took()})")
    print("\nNext, a map of each slide by the model that did not see it:\n")
    print(f"  uv run predict.py --out_of_fold {settings.runs[0]} --wsi SLIDES_DIR --visualize")


def folder_name(names: Sequence[str]) -> str:
    """Return what the folder of a comparison of runs with these names is called, such as LiteMIL_mine_vs_ABMIL_mine;
    of many or long ones the first, how many others there are, and a digest of all.
    """
    plain = [re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "run" for name in names]
    joined = "_vs_".join(plain)
    if len(joined.encode()) <= _LONGEST_NAME:
        return joined
    start = plain[0].encode()[: _LONGEST_NAME // 2].decode(errors="ignore")
    return f"{start}_vs_{plural(len(names) - 1, 'other').replace(' ', '_')}_{digest(*names)[:8]}"


def _record(runs: Sequence[Run], metrics: Sequence[str]) -> dict[str, Any]:
    """What makes two comparisons the same: the runs as they are now, and the metrics."""
    contents = [
        digest(*((run.path / name).read_bytes() for name in ("outputs.json", "predictions.csv", "splits.json")))
        for run in runs
    ]
    return {
        "runs": [{"name": run.name, "digest": content} for run, content in zip(runs, contents, strict=True)],
        "metrics": list(metrics),
    }


def _make_way(folder: Path, record: dict[str, Any]) -> None:
    """Give the files of another comparison other names, and say so; those of the same one will be replaced."""
    figures = [path for name in _FIGURES for path in figure_paths(folder / name, FORMATS)]
    there = [path for path in (folder / _RECORD, *(folder / name for name in _TABLES), *figures) if path.exists()]
    known = read_record(folder / _RECORD)
    if not there or known == record:
        return
    aside = ", ".join(path.name for path in set_aside(*there))
    log.warning("%s held another comparison (%s); its files are now %s", folder, _difference(known, record), aside)


def _difference(known: dict[str, Any], record: dict[str, Any]) -> str:
    """How a comparison that is there differs from the one that is to be written."""
    try:
        names, metrics = [run["name"] for run in known["runs"]], ", ".join(known["metrics"])
    except (KeyError, TypeError):
        return "it does not say of which runs"
    if names != [run["name"] for run in record["runs"]]:
        return f"of {', '.join(names)}"
    return f"in {metrics}" if known["metrics"] != record["metrics"] else "the runs have changed since"


def check_metrics(runs: Sequence[Run], metrics: Sequence[str]) -> None:
    """Raise ConfigError for a metric that is unknown, given twice, or that a run does not report as its predictions
    have it.
    """
    known = runs[0].predictions.task.metric_names
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"--metrics {metric}: unknown; these are: {', '.join(known)}")
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
    """Warn where some runs' models standardise features and others' do not: what differs may be the scale."""
    standardize = {run.name: bool((run.outputs.get("standardize") or {}).get("folds")) for run in runs}
    if len(set(standardize.values())) > 1:
        names = [", ".join(name for name in standardize if standardize[name] is does) for does in (True, False)]
        log.warning(
            "features are standardised in %s and not in %s: differences may be those of the features' scale, not the "
            "models'; train all with one --standardize", *names,
        )  # fmt: skip


def compare(runs: Sequence[Run], metrics: Sequence[str], resamples: int = RESAMPLES) -> list[Difference]:
    """Every pair of runs in every metric, the metrics in the order given.

    The answer for a pair does not depend on which other runs are there, but for the `_holm` p's.
    """
    first = runs[0]
    pooled = [run.predictions.metrics for run in runs]
    folds, sizes = [_fold_figures(run.predictions) for run in runs], _fold_sizes(first)
    drawn = [
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
                *(paired_interval(drawn[a][metric], drawn[b][metric]) or (None, None, None)),
                *_over_folds(
                    [figures[metric] for figures in folds[a]], [figures[metric] for figures in folds[b]], sizes
                ),
            )
            for a, b in combinations(range(len(runs)), 2)
        ]
        differences += _adjusted(pairs)
    return differences


def _minus(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _fold_figures(predictions: Predictions) -> list[dict[str, float | None]]:
    folds = predictions.folds
    assert folds is not None  # noqa: S101 - for the type checker: a run's predictions have folds
    return [predictions.where(folds == fold).metrics for fold in np.unique(folds)]


def _fold_sizes(run: Run) -> list[tuple[int, int]]:
    """How many slides each outer fold was trained on, those of inner validation among them, and tested on."""
    trained: dict[int, set[str]] = {}
    tested = {split.fold: len(set(split.slides["test"])) for split in run.splits}
    for split in run.splits:
        trained.setdefault(split.fold, set()).update(split.slides["train"], split.slides["val"])
    return [(len(trained[fold]), tested[fold]) for fold in sorted(tested)]


def _over_folds(
    first: Sequence[float | None], second: Sequence[float | None], sizes: Sequence[tuple[int, int]]
) -> tuple[float | None, int, float | None]:
    """The mean difference over the folds where both are defined, how many these are, and the corrected t test's p."""
    known = [(a - b, *size) for a, b, size in zip(first, second, sizes, strict=True) if a is not None and b is not None]
    if not known:
        return None, 0, None
    differences, n_train, n_test = zip(*known, strict=True)
    tested = nadeau_bengio(differences, n_train, n_test)
    return float(np.mean(differences)), len(known), tested and tested[1]


def _adjusted(pairs: Sequence[Difference]) -> list[Difference]:
    bootstrap, corrected = holm([one.p_bootstrap for one in pairs]), holm([one.p_corrected_t for one in pairs])
    return [
        replace(one, p_bootstrap_holm=p, p_corrected_t_holm=q)
        for one, p, q in zip(pairs, bootstrap, corrected, strict=True)
    ]


def report(runs: Sequence[Run], differences: Sequence[Difference]) -> str:
    """Markdown: the runs, their differences, and how to read them."""
    titles = _titles(runs, list(dict.fromkeys(one.metric for one in differences)))
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
    """How many weights a model of the run has; the least and the most where the folds chose models of several sizes."""
    spec = run.outputs["model"]
    try:
        chosen = [fold["selection"].get("setting", {}) for fold in run.outputs["fold_results"]]
        specs = [spec | {name: value for name, value in setting.items() if name in spec} for setting in chosen]
        counts = {sum(weights.numel() for weights in build_mil(**one).parameters()) for one in specs}
    except (ModelError, KeyError, TypeError, AttributeError):  # a model of another version
        return "-"
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) if counts else "-"


def _differences_table(differences: Sequence[Difference], titles: Mapping[str, str], are_many: bool) -> str:
    header = ["pair", "metric", "difference", "95% CI", "p (bootstrap)"]
    header += ["Holm"] if are_many else []
    header += ["mean over folds", "p (corrected t)"]
    header += ["Holm"] if are_many else []
    rows = [header]
    for one in differences:
        interval = None if one.low is None or one.high is None else (one.low, one.high)
        row = [one.pair, titles[one.metric], _figure(one.difference, "+"), _range(interval, "+"), _p(one.p_bootstrap)]
        row += [_p(one.p_bootstrap_holm)] if are_many else []
        row += [_figure(one.fold_mean, "+"), _p(one.p_corrected_t)]
        row += [_p(one.p_corrected_t_holm)] if are_many else []
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
    sentences = [
        [
            f"{plural(slides, 'slide')} of {plural(patients, 'patient')}, tested in {plural(folds, 'fold')}.",
            "A difference is the first run's figure minus the second's, over all tested slides.",
            primary,
            pairs,
        ],
        [
            f"CI and p (bootstrap): patients were drawn {RESAMPLES} times, the same ones for all runs. Both are "
            "conditional on the trained models: what other patients would have given, not what another training would.",
            few,
        ],
        [
            "p (corrected t): whether the mean over folds outlasts another training (Nadeau and Bengio 2003, the "
            'corrected resampled t test); "-" where fewer than two folds define it, or all differ by the same. That '
            "mean need not be the difference of all slides, where those of several folds are ranked together.",
        ],
        [
            "A large p does not show that two models are equally good: the interval says which differences these "
            "patients leave open.",
        ],
    ]
    return "\n".join("- " + " ".join(filter(None, parts)) for parts in sentences)


def _intervals(
    differences: Sequence[Difference], titles: Mapping[str, str]
) -> dict[str, dict[tuple[str, str], tuple[float, float, float]]]:
    """What the figure draws: by metric and pair, the difference and its interval, where both are defined."""
    drawn: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {}
    for one in differences:
        if one.difference is not None and one.low is not None and one.high is not None:
            pairs = drawn.setdefault(titles[one.metric], {})
            pairs[one.first, one.second] = (one.difference, one.low, one.high)
    return drawn


def _titles(runs: Sequence[Run], metrics: Sequence[str]) -> dict[str, str]:
    """Return how the metrics are called in tables and figures."""
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
    """A Markdown table, legible as it is; the first row is its head, all but the first `texts` columns hold numbers."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    columns = []
    for number, column in enumerate(zip(*escaped, strict=True)):
        width, is_text = max(map(len, column)), number < texts
        head, *cells = [cell.ljust(width) if is_text else cell.rjust(width) for cell in column]
        columns.append([head, "-" * width if is_text else "-" * (width - 1) + ":", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


if __name__ == "__main__":
    cli.run(main)
