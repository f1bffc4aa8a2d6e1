"""Is one model better than another? Training runs on the same slides and splits, compared pair by pair.

uv run python -m utils.compare outputs/LiteMIL/mine outputs/ABMIL/mine
uv run python -m utils.compare outputs/*/mine --metrics auc brier --output_dir outputs/comparison/mine
"""

from utils.core import cli
from utils.core.config import Comparison

_FLAGS = {"comparison": Comparison}
if __name__ == "__main__":
    cli.begin(str(__doc__), _FLAGS)

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from MILS import ModelError, build_mil, list_mils
from utils.core.errors import ConfigError, counted, named
from utils.core.files import read_json, write_records, write_text
from utils.core.runtime import derive_seed, log, progress
from utils.learning.comparison import LOWER_IS_BETTER, holm, nadeau_bengio, paired_interval
from utils.learning.figures import comparison_figure, save_figure
from utils.learning.metrics import classification_metrics, metric_names
from utils.learning.splits import PARTS, NamedSplit, read_splits
from utils.learning.statistics import bootstrap_draws, pooled_metrics

RESAMPLES = 5000
# With fewer patients, percentile intervals are known to be too narrow.
_FEW_PATIENTS = 50
_SLIDE = ["wsi_id", "label", "case_id"]
_FILES = ("run.json", "outputs.json", "predictions.csv", "splits.json")


@dataclass(frozen=True)
class Run:
    """A finished training run: the content of its `outputs.json`, its out-of-fold predictions by repeat and slide, its
    splits. `name` is what tells it apart from the other runs.
    """

    path: Path
    name: str
    outputs: dict[str, Any]
    predictions: pd.DataFrame
    splits: list[NamedSplit]

    @property
    def class_names(self) -> list[str]:
        return self.outputs["class_names"]

    def reported(self, metric: str) -> tuple[float | None, Sequence[float] | None]:
        """The pooled figure and its 95% interval as `outputs.json` has them; ConfigError where it lacks them."""
        try:
            return self.outputs["pooled"][metric], self.outputs["intervals_95"][metric]
        except (KeyError, TypeError) as failure:
            raise ConfigError(
                f"{self.path / 'outputs.json'}: no pooled {metric} with its interval; train the run again, or leave it "
                "out of --metrics"
            ) from failure

    @property
    def pooled(self) -> dict[str, float | None]:
        """Every metric of the predictions."""
        return pooled_metrics(self.labels, self.probabilities, self.repeats, self.class_names)

    @property
    def repeats(self) -> np.ndarray:
        """`(n,)` int"""
        return self.predictions["repeat"].to_numpy()

    @property
    def labels(self) -> np.ndarray:
        """`(n,)` int"""
        return self.predictions["label"].map(self.class_names.index).to_numpy()

    @property
    def probabilities(self) -> np.ndarray:
        """`(n, C)`"""
        return self.predictions[[f"prob_{name}" for name in self.class_names]].to_numpy()


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
    differences = compare(runs, settings.metrics)
    text = report(runs, differences)
    folder = settings.output_dir
    write_text(folder / "comparison.md", text)
    write_records(folder / "comparison.csv", differences)
    save_figure(comparison_figure(_intervals(differences)), folder / "comparison.png")
    print(text)
    log.info("%s: comparison.md, comparison.csv and comparison.png written", folder)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The finished runs in the folders `paths`, at least two, on the same slides and splits.

    Raises ConfigError for a folder that holds no finished run, one given twice, and runs that differ in classes,
    slides, patients, labels or splits.
    """
    places = [path.resolve() for path in paths]
    twice = [str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"{twice[0]}: given twice; name each run once")
    names = _distinguishing(places)
    first, *others = [_read_run(path, name) for path, name in zip(paths, names, strict=True)]
    for other in others:
        _check_same_slides(first, other)
        _check_same_splits(first, other)
    return [first, *others]


def _distinguishing(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    for length in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise ValueError("equal paths")


def _read_run(path: Path, name: str) -> Run:
    for file in _FILES:
        if not (path / file).is_file():
            raise ConfigError(f"{path}: no finished training run ({file} is missing); give a folder that train.py made")
    record = read_json(path / "run.json", ConfigError)
    if not isinstance(record, dict) or record.get("finished") is not True:
        raise ConfigError(f"{path}: this run is not finished; give its train.py command again to finish it")
    outputs = read_json(path / "outputs.json", ConfigError)
    classes = outputs.get("class_names") if isinstance(outputs, dict) else None
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(one, str) for one in classes):
        raise ConfigError(f"{path / 'outputs.json'}: no class_names, as train.py writes them; train the run again")
    predictions = _read_predictions(path / "predictions.csv", classes)
    splits = read_splits(path / "splits.json", set(predictions["wsi_id"]))
    tested = {(split.fold, wsi_id) for split in splits for wsi_id in split.parts["test"]}
    strangers = sorted(tested ^ set(zip(predictions["fold"], predictions["wsi_id"], strict=True)))
    if strangers:
        told = named([f"{wsi_id} of fold {fold}" for fold, wsi_id in strangers])
        raise ConfigError(f"{path}: predictions.csv and splits.json are not of one run ({told}); train it again")
    return Run(path, name, outputs, predictions, splits)


def _read_predictions(path: Path, classes: Sequence[str]) -> pd.DataFrame:
    """The table in an order that does not depend on the run's."""
    probabilities = [f"prob_{name}" for name in classes]
    kinds = {"wsi_id": str, "case_id": str, "label": str, "fold": int, "repeat": int}
    kinds |= dict.fromkeys(probabilities, float)
    try:
        texts = pd.read_csv(path, usecols=list(kinds), dtype=str, keep_default_na=False)
        table = pd.DataFrame({name: texts[name].astype(kind) for name, kind in kinds.items()})
    except (OSError, ValueError) as failure:
        raise ConfigError(
            f"{path}: no predictions as train.py writes them ({failure}); train the run again"
        ) from failure
    values = table[probabilities].to_numpy()
    faults = {
        "no slide in it": table.empty,
        "a probability that is no number from 0 to 1": not ((values >= 0) & (values <= 1)).all(),
        "a label that is no class": not set(table["label"]) <= set(classes),
        "a slide twice in one repeat": table.duplicated(["repeat", "wsi_id"]).any(),
        "a slide with two labels or patients": len(table[_SLIDE].drop_duplicates()) > len(_slides(table)),
    }
    for fault, is_there in faults.items():
        if is_there:
            raise ConfigError(f"{path}: {fault}; train the run again")
    return table.sort_values(["repeat", "wsi_id"], ignore_index=True)


def _slides(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Each slide's label and patient."""
    rows = table[_SLIDE].itertuples(index=False, name=None)
    return {wsi_id: {"label": label, "case_id": case_id} for wsi_id, label, case_id in rows}


def _check_same_slides(first: Run, other: Run) -> None:
    if first.class_names != other.class_names:
        raise ConfigError(
            f"{other.path}: classes {', '.join(other.class_names)}, those of {first.path} are "
            f"{', '.join(first.class_names)}; train both with the same --class_names"
        )
    both = f"{first.path} and {other.path}"
    mine, theirs = _slides(first.predictions), _slides(other.predictions)
    for alone, run in ((mine.keys() - theirs, first), (theirs.keys() - mine, other)):
        if alone:
            raise ConfigError(
                f"{both}: {counted(len(alone), 'slide')} in {run.path} alone: {named(sorted(alone))}; train both on "
                "the same labels.csv and splits"
            )
    for column, what in (("label", "label"), ("case_id", "patient")):
        differing = [wsi_id for wsi_id in sorted(mine) if mine[wsi_id][column] != theirs[wsi_id][column]]
        if differing:
            told = [f"{wsi_id} ({mine[wsi_id][column]}, {theirs[wsi_id][column]})" for wsi_id in differing]
            raise ConfigError(
                f"{both}: {counted(len(differing), 'slide')} with another {what}: {named(told)}; train both on the "
                "same labels.csv"
            )


def _check_same_splits(first: Run, other: Run) -> None:
    remedy = f"train it with --splits {first.path / 'splits.json'}"
    for mine, theirs in zip(first.splits, other.splits, strict=False):
        for part in PARTS:
            moved = sorted(set(mine.parts[part]) ^ set(theirs.parts[part]))
            if moved:
                raise ConfigError(
                    f"{other.path}: not the splits of {first.path}: the {part} part of {theirs.name} differs in "
                    f"{counted(len(moved), 'slide')}: {named(moved)}; {remedy}"
                )
        if (mine.fold, mine.repeat) != (theirs.fold, theirs.repeat):
            raise ConfigError(
                f"{other.path}: not the splits of {first.path}: {theirs.name} is of repeat {theirs.repeat}, where "
                f"{mine.name} is of repeat {mine.repeat}; {remedy}"
            )
    if len(first.splits) != len(other.splits):
        raise ConfigError(
            f"{other.path}: not the splits of {first.path}: {len(other.splits)} inner folds in all, there "
            f"{len(first.splits)}; {remedy}"
        )


def check_metrics(runs: Sequence[Run], metrics: Sequence[str]) -> None:
    """Raise ConfigError for a metric that is unknown, given twice, or that a run does not report as its predictions
    have it.
    """
    known = metric_names(runs[0].class_names)
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"--metrics {metric}: unknown; these are: {', '.join(known)}")
        if metrics.count(metric) > 1:
            raise ConfigError(f"--metrics {metric}: given twice; name each once")
    for run in runs:
        computed = run.pooled
        for metric in metrics:
            value, _ = run.reported(metric)
            if (value is None) != (computed[metric] is None) or abs((value or 0) - (computed[metric] or 0)) > 1e-6:
                raise ConfigError(
                    f"{run.path}: {metric} is {_figure(value)} in outputs.json and {_figure(computed[metric])} by "
                    "predictions.csv; one of them was changed, so train the run again"
                )


def compare(runs: Sequence[Run], metrics: Sequence[str], resamples: int = RESAMPLES) -> list[Difference]:
    """Every pair of runs in every metric, the metrics in the order given.

    The answer for a pair does not depend on which other runs are there, but for the `_holm` p's.
    """
    first = runs[0]
    pooled, folds, sizes = [run.pooled for run in runs], [_fold_figures(run) for run in runs], _fold_sizes(first)
    cases = first.predictions["case_id"].to_numpy()
    drawn = [
        bootstrap_draws(
            run.labels, run.probabilities, cases, derive_seed("comparison"), resamples,
            repeats=run.repeats, class_names=run.class_names,
        )
        for run in progress(runs, "Resampling patients", unit="run")
    ]  # fmt: skip
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


def _fold_figures(run: Run) -> list[dict[str, float | None]]:
    labels, probabilities, fold_of = run.labels, run.probabilities, run.predictions["fold"].to_numpy()
    return [
        classification_metrics(labels[fold_of == fold], probabilities[fold_of == fold], run.class_names)
        for fold in np.unique(fold_of)
    ]


def _fold_sizes(run: Run) -> list[tuple[int, int]]:
    """How many slides each outer fold was trained on, those of inner validation among them, and tested on."""
    trained: dict[int, set[str]] = {}
    tested = {split.fold: len(set(split.parts["test"])) for split in run.splits}
    for split in run.splits:
        trained.setdefault(split.fold, set()).update(split.parts["train"], split.parts["val"])
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
    metrics = list(dict.fromkeys(one.metric for one in differences))
    sections = [
        f"# {len(runs)} training runs compared",
        _runs_table(runs, metrics),
        "## Differences",
        _differences_table(differences, are_many=len(runs) > 2),
        "## How to read this",
        _reading(runs[0], differences, metrics, are_many=len(runs) > 2),
    ]
    return "\n\n".join(sections) + "\n"


def _runs_table(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    rows = [["run", "model", "parameters", *[f"{_title(metric)}, 95% CI" for metric in metrics]]]
    for run in runs:
        model = run.outputs.get("model")
        name = model.get("name") if isinstance(model, dict) else None
        cells = []
        for metric in metrics:
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


def _differences_table(differences: Sequence[Difference], are_many: bool) -> str:
    header = ["pair", "metric", "difference", "95% CI", "p (bootstrap)"]
    header += ["Holm"] if are_many else []
    header += ["mean over folds", "p (corrected t)"]
    header += ["Holm"] if are_many else []
    rows = [header]
    for one in differences:
        interval = None if one.low is None or one.high is None else (one.low, one.high)
        row = [one.pair, _title(one.metric), _figure(one.difference, "+"), _range(interval, "+"), _p(one.p_bootstrap)]
        row += [_p(one.p_bootstrap_holm)] if are_many else []
        row += [_figure(one.fold_mean, "+"), _p(one.p_corrected_t)]
        row += [_p(one.p_corrected_t_holm)] if are_many else []
        rows.append(row)
    return _table(rows, texts=2)


def _reading(run: Run, differences: Sequence[Difference], metrics: Sequence[str], are_many: bool) -> str:
    slides, patients, folds = (len(set(run.predictions[column])) for column in ("wsi_id", "case_id", "fold"))
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
            f"{counted(slides, 'slide')} of {counted(patients, 'patient')}, tested in {counted(folds, 'fold')}.",
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


def _intervals(differences: Sequence[Difference]) -> dict[str, dict[tuple[str, str], tuple[float, float, float]]]:
    """What the figure draws: by metric and pair, the difference and its interval, where both are defined."""
    drawn: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {}
    for one in differences:
        if one.difference is not None and one.low is not None and one.high is not None:
            pairs = drawn.setdefault(_title(one.metric), {})
            pairs[one.first, one.second] = (one.difference, one.low, one.high)
    return drawn


def _title(metric: str) -> str:
    return metric.replace("_", " ") + (" (lower is better)" if metric in LOWER_IS_BETTER else "")


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
