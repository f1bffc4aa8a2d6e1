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
from utils.core.text import figure_text, p_text, range_text


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """Which training runs `python -m utils.compare` compares, and by which metrics."""

    runs: tuple[Path, ...] = option(REQUIRED, "folders of finished training runs", metavar="RUN", positional=True)
    metrics: tuple[str, ...] = option(
        (),
        "metrics to compare, the primary one first (default: of classes auc balanced_accuracy f1_macro, else those of "
        "the task)",
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MILS import ModelError, build_mil
from utils.core.errors import plural
from utils.core.files import digest, read_record, set_aside, write_json, write_records, write_text
from utils.core.plots import FORMATS, figure_paths, write_figures
from utils.core.runtime import log
from utils.evaluation import comparison
from utils.evaluation.comparison import Difference
from utils.evaluation.comparison_figures import comparison_figure, runs_roc_figure
from utils.evaluation.predictions import Predictions
from utils.learning.finished_runs import Run, read_runs

_ENOUGH_REPEATS = 3
_FOLDER, _LONGEST_NAME = Path("outputs/comparison"), 100  # bytes
_RECORD, _TABLES, _FIGURES = "comparison.json", ("comparison.md", "comparison.csv"), ("comparison", "roc")


def main() -> None:
    (settings,) = cli.parse(str(__doc__), _FLAGS)
    runs = read_runs(settings.runs)
    task = runs[0].predictions.task
    metrics = settings.metrics or task.compared_metrics
    check_metrics(runs, metrics)
    _warn_of_scale(runs)
    differences = compare(runs, metrics)
    text = report(runs, differences)
    primary, predictions = next(iter(_by_unit(runs).items()))
    folder = settings.output_dir or _FOLDER / folder_name([run.name for run in runs])
    record = _record(runs, metrics)
    _set_aside_another(folder, record)
    write_json(folder / _RECORD, record)
    write_text(folder / _TABLES[0], text)
    write_records(folder / _TABLES[1], differences)
    figures = {_FIGURES[0]: comparison_figure(_intervals(differences, _titles(runs, metrics)), primary)}
    if task.ranked_outputs:
        figures[_FIGURES[1]] = runs_roc_figure(predictions)
    paths = write_figures(folder, figures, settings.figure_format)
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
    """Return what identifies a comparison: the runs with a digest of their files, the metrics, and what they are of,
    the primary one first.
    """
    files = "outputs.json", "predictions.csv", "splits.json"
    return {
        "runs": [
            {"name": run.name, "digest": digest(*((run.path / file).read_bytes() for file in files))} for run in runs
        ],
        "metrics": list(metrics),
        "units": list(_by_unit(runs)),
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
            value, _ = run.pooled_figure(metric)
            if (value is None) != (computed[metric] is None) or abs((value or 0) - (computed[metric] or 0)) > 1e-6:
                raise ConfigError(
                    f"{run.path}: {metric} is {figure_text(value)} in outputs.json and "
                    f"{figure_text(computed[metric])} by predictions.csv; one of them was changed, so train the run "
                    "again"
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


def compare(runs: Sequence[Run], metrics: Sequence[str]) -> list[Difference]:
    """Compare every pair of runs in every metric, in the order of `metrics` (see `comparison.compare`): of patients
    first, where a patient has several slides, then of slides.
    """
    by_unit = _by_unit(runs)
    return [
        difference
        for number, (unit, predictions) in enumerate(by_unit.items())
        for difference in comparison.compare(predictions, _fold_sizes(runs[0], unit), metrics, unit, number == 0)
    ]


def _by_unit(runs: Sequence[Run]) -> dict[str, dict[str, Predictions]]:
    """Return the predictions of the runs, by unit (see `PredictionRows.by_unit`) and by the run's name."""
    of_runs = {run.name: run.predictions.by_unit() for run in runs}
    return {unit: {name: units[unit] for name, units in of_runs.items()} for unit in of_runs[runs[0].name]}


def _fold_sizes(run: Run, unit: str) -> list[tuple[int, int]]:
    """Return how many slides or patients each outer fold was trained on, with inner validation, and tested on."""
    slides = run.predictions.slides.tolist()
    owners = dict(zip(slides, run.predictions.cases.tolist() if unit == "patient" else slides, strict=True))
    trained: dict[int, set[str]] = {}
    tested: dict[int, int] = {}
    for split in run.splits:
        train, val, test = ({owners[slide] for slide in split.slides[part]} for part in ("train", "val", "test"))
        trained.setdefault(split.fold, set()).update(train, val)
        tested[split.fold] = len(test)
    return [(len(trained[fold]), tested[fold]) for fold in sorted(tested)]


def report(runs: Sequence[Run], differences: Sequence[Difference]) -> str:
    """Return a report in Markdown: the runs, their differences, and how to read them."""
    titles = _titles(runs, list(dict.fromkeys(difference.metric for difference in differences)))
    sections = [
        f"# {len(runs)} training runs compared",
        _runs_table(runs, titles),
        "## Differences",
        _differences_table(differences, titles),
        "## How to read this",
        _reading(runs[0], differences, list(titles)),
    ]
    return "\n\n".join(sections) + "\n"


def _runs_table(runs: Sequence[Run], titles: Mapping[str, str]) -> str:
    rows = [["run", "of", "model", "parameters", *[f"{title}, 95% CI" for title in titles.values()]]]
    for unit, by_run in _by_unit(runs).items():
        for run in runs:
            model = run.outputs.get("model")
            name = model.get("name") if isinstance(model, dict) else None
            estimates = by_run[run.name].reported_estimates
            cells = [
                f"{figure_text(estimates[metric].value)} ({range_text(estimates[metric].interval)})"
                for metric in titles
            ]
            rows.append([run.name, f"{unit}s", name or "-", _parameters(run), *cells])
    return _table(rows, texts=3)


def _parameters(run: Run) -> str:
    """Return the number of weights of the run's models; the range if the folds chose models of several sizes."""
    counts = run.outputs.get("parameters")  # earlier runs lack it
    try:
        counts = counts or [sum(weights.numel() for weights in build_mil(**spec).parameters()) for spec in _specs(run)]
    except (ModelError, KeyError, TypeError, AttributeError):  # a model of another version
        return "-"
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) if counts else "-"


def _specs(run: Run) -> list[dict[str, Any]]:
    """Return the spec of each fold's model, with the setting that the fold chose."""
    spec, folds = run.outputs["model"], run.outputs["fold_results"]
    settings = [fold["selection"].get("setting", {}) for fold in folds]
    return [spec | {name: value for name, value in setting.items() if name in spec} for setting in settings]


def _differences_table(differences: Sequence[Difference], titles: Mapping[str, str]) -> str:
    holm = ["Holm"] if sum(pair.is_primary for pair in differences) > 1 else []
    header = ["pair", "of", "metric", "difference", "95% CI", "p", *holm, "95% CI, these models", "p, these models"]
    rows = [
        [
            pair.pair, f"{pair.unit}s", titles[pair.metric], figure_text(pair.difference, "+"),
            range_text(_limits(pair.low, pair.high), "+"), p_text(pair.p), *(p_text(pair.p_holm) for _ in holm),
            range_text(_limits(pair.models_low, pair.models_high), "+"), p_text(pair.p_models),
        ]
        for pair in differences
    ]  # fmt: skip
    return _table([header, *rows], texts=3)


def _reading(run: Run, differences: Sequence[Difference], metrics: Sequence[str]) -> str:
    predictions = run.predictions
    slides = f"{plural(predictions.n_slides, 'slide')} of " if predictions.unit == "slide" else ""
    ranking = " and the ".join(name.replace("_", " ") for name in predictions.ranked_within if name in metrics)
    units = list(dict.fromkeys(difference.unit for difference in differences))
    pairs = len(differences) // len(metrics) // len(units)
    items = [
        [
            f"{slides}{plural(predictions.n_cases, 'patient')}, tested in "
            f"{plural(predictions.n_folds, 'fold')}. A difference is the first run's metric minus the second's.",
            f"The {ranking} of a run compares {units[0]}s of a fold only, as one model ranked them." if ranking else "",
        ],
        [
            "The figures of patients are primary, and average their slides' answers; those of slides stand beside."
            if len(units) > 1
            else ""
        ],
        [
            "95% CI and p: is the first algorithm better than the second when both are trained on cohorts like this "
            "one? The variance over patients is enlarged for other training slides.",
            "With --repeats 3 or more of train.py, chance of splits and seeds averages out and the test finds smaller "
            "differences."
            if predictions.n_repeats < _ENOUGH_REPEATS
            else "",
        ],
        [
            "These models: do the trained models of the first run do better on other patients than those of the "
            "second? Nothing is said of other trainings."
        ],
        [
            f"{metrics[0]} is the primary metric, as the first one named." if len(metrics) > 1 else "",
            _holm_words(metrics, pairs, units),
        ],
        [
            "A large p does not show that two models are equally good: the interval gives the differences that are "
            "compatible with these patients."
        ],
    ]
    return "\n".join("- " + " ".join(filter(None, item)) for item in items if any(item))


def _holm_words(metrics: Sequence[str], pairs: int, units: Sequence[str]) -> str:
    """Return for what p is corrected; "" for a single pair in a single metric."""
    families = [f"the {pairs} pairs of {metrics[0]}"] if pairs > 1 else []
    if pairs * (len(metrics) - 1) > 1:
        families.append(f"the {pairs * (len(metrics) - 1)} tests of the other metrics")
    of_each = ", of patients and of slides apart" if len(units) > 1 else ""
    return f"Holm: p corrected for {' and for '.join(families)}{of_each}." if families else ""


def _limits(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _intervals(
    differences: Sequence[Difference], titles: Mapping[str, str]
) -> dict[str, dict[tuple[str, str], tuple[float, float, float]]]:
    """Return the primary differences with their intervals by metric and pair, where both are defined."""
    intervals: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {}
    for pair in differences:
        limits = _limits(pair.low, pair.high)
        if pair.is_primary and pair.difference is not None and limits is not None:
            intervals.setdefault(titles[pair.metric], {})[pair.first, pair.second] = (pair.difference, *limits)
    return intervals


def _titles(runs: Sequence[Run], metrics: Sequence[str]) -> dict[str, str]:
    """Return the names of the metrics in tables and figures."""
    lower_is_better = runs[0].predictions.task.lower_is_better
    return {
        metric: metric.replace("_", " ") + (" (lower is better)" if metric in lower_is_better else "")
        for metric in metrics
    }


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
