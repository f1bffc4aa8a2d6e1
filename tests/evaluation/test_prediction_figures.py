import sys
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image
from scipy.stats import binomtest

from tests.small import TASK
from utils.core.plots import COLOURS, STYLES, save_figure
from utils.evaluation.prediction_figures import (
    calibration_figure,
    confusion_figure,
    precision_recall_figure,
    roc_figure,
)
from utils.evaluation.predictions import Predictions
from utils.evaluation.resampling import pooled_metrics
from utils.tasks.classification import Classification

LONG = ("Clear cell renal cell carcinoma", "Papillary renal cell carcinoma type 2", "Chromophobe renal cell carcinoma")


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def cohort(num_classes: int, count: int = 40) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % num_classes
    probabilities = rng.dirichlet(np.ones(num_classes), size=count)
    return labels, probabilities, tuple(f"class_{i}" for i in range(num_classes))


def predictions(labels, probabilities, names, folds=None, repeats=None, **more) -> Predictions:
    """Each slide of a patient of its own, in three folds, once."""
    count = len(labels)
    folds = np.arange(count) // len(names) % 3 + 1 if folds is None else folds
    repeats = np.ones(count, dtype=int) if repeats is None else repeats
    cases = np.array([f"P{index % (count // len(np.unique(repeats)))}" for index in range(count)])
    slides = np.char.add(cases, "-S1")
    return Predictions(slides, cases, labels, probabilities, Classification(tuple(names)), repeats, 0, folds, **more)


def roc(*answers, **more) -> Figure:
    return roc_figure(predictions(*answers, **more))


def confusion(*answers, **more) -> Figure:
    return confusion_figure(predictions(*answers, **more))


def calibration(*answers, **more) -> Figure:
    return calibration_figure(predictions(*answers, **more))


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def entries(figure: Figure) -> list[str]:
    """Of the legend, each in one line."""
    return [" ".join(text.get_text().split()) for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize(("num_classes", "curves"), [(2, 1), (3, 3), (9, 9)])
def test_roc_has_a_curve_per_class(num_classes, curves):
    """With a band and a curve of each fold, but not for nine classes."""
    figure = roc(*cohort(num_classes, 81))
    axes = figure.axes[0]
    assert len(entries(figure)) == curves
    assert len(axes.lines) == curves * (4 if curves <= 3 else 1) + 1  # folds, pooled; the diagonal
    assert len(axes.collections) == (curves if curves <= 3 else 0)
    assert ("left out" in axes.get_title()) == (curves > 3)


def test_nine_classes_differ_without_colour():
    assert len(COLOURS) < 9 <= len(set(STYLES))  # so that a tenth curve, not a colour, is the first to repeat
    axes = roc(*cohort(9, 81)).axes[0]
    patterns = {str(line._dash_pattern) for line in axes.lines[:9]}
    assert len(patterns) == 9


def test_roc_names_the_pooled_auc_and_its_interval():
    labels, probabilities, names = cohort(2)
    rows = predictions(labels, probabilities, names)
    auc, (low, high) = rows.pooled["auc"].value, rows.pooled["auc"].interval
    pooled = f"class_1: AUC {auc:.3f} (95% CI {low:.3f} to {high:.3f})"
    within, (low, high) = rows.within_folds["auc"].value, rows.within_folds["auc"].interval
    assert entries(roc_figure(rows)) == [f"{pooled}; within folds {within:.3f} ({low:.3f} to {high:.3f})"]
    assert entries(roc_figure(replace(rows, folds=None))) == [pooled]


def test_roc_of_repeats_is_their_mean():
    labels, positive = np.array([0, 1, 0, 1] * 2), np.array([0.1, 0.9, 0.2, 0.8, 0.9, 0.1, 0.8, 0.2])
    answers = (labels, np.stack([1 - positive, positive], axis=1), ("no", "yes"))
    figure = roc(*answers, folds=np.repeat([1, 2], 4), repeats=np.repeat([1, 2], 4))
    mean = figure.axes[0].lines[2]
    assert set(mean.get_ydata()[1:-1]) == {0.5}  # one repeat ranks all rightly, the other all wrongly
    assert "AUC 0.500" in entries(figure)[0]
    assert "mean of 2 repeats" in figure.axes[0].get_title()


def test_roc_leaves_out_folds_of_one_class():
    labels, probabilities, names = cohort(2)
    assert len(roc(labels, probabilities, names, labels + 1).axes[0].lines) == 2


def test_roc_of_one_class_alone_says_so():
    _, probabilities, names = cohort(2)
    axes = roc(np.zeros(40, dtype=int), probabilities, names).axes[0]
    assert len(axes.lines) == 1
    assert "undefined" in axes.get_title()


@pytest.mark.parametrize("num_classes", [2, 3])
def test_confusion_counts_slides(num_classes):
    labels, probabilities, names = cohort(num_classes)
    axes = confusion(labels, probabilities, names).axes[0]
    predicted = probabilities.argmax(axis=1)
    for text in axes.texts:
        column, row = text.get_position()
        count = int(((labels == row) & (predicted == column)).sum())
        assert text.get_text() == f"{count}\n{count / (labels == row).sum():.0%}"
    assert len(axes.texts) == num_classes**2
    assert [label.get_text() for label in axes.get_xticklabels()] == list(names)


def test_confusion_of_a_class_without_slides():
    assert texts(confusion(np.array([0, 0]), np.array([[0.9, 0.1], [0.2, 0.8]]), ("no", "yes")).axes[0]) == [
        "1\n50%",
        "1\n50%",
        "0\n0%",
        "0\n0%",
    ]


def test_confusion_counts_every_repeat():
    labels, probabilities, names = cohort(2)
    twice = confusion(np.tile(labels, 2), np.tile(probabilities, (2, 1)), names, repeats=np.repeat([1, 2], 40)).axes[0]
    assert "slides x 2 repeats" in twice.get_title()
    assert sum(int(text.split("\n")[0]) for text in texts(twice)) == 80


@pytest.mark.parametrize("count", [2, 3, 9])
def test_long_class_names_do_not_overlap(count):
    """Unrotated labels by their boxes; slanted ones by the distance of the parallel lines they stand on."""
    names = tuple(f"{LONG[index % 3]} {index}" for index in range(count))
    labels, probabilities, _ = cohort(count, 45)
    figure = confusion(labels, probabilities, names)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for ticks, side in ((axes.get_xticklabels(), 0), (axes.get_yticklabels(), 1)):
        boxes = [label.get_window_extent().get_points()[:, side] for label in ticks]
        if ticks[0].get_rotation():
            starts = axes.transData.transform([(index, 0) for index in range(count)])[:, 0]
            height = ticks[0].get_fontsize() * figure.dpi / 72
            assert np.diff(starts).min() * np.sin(np.radians(ticks[0].get_rotation())) > height
        else:
            boxes = sorted(map(tuple, boxes))
            assert all(end <= start for (_, end), (start, _) in pairwise(boxes))


def marks(figure: Figure, marker: str = "o") -> list[Line2D]:
    """Those of the bins."""
    return [line for line in figure.axes[0].lines if line.get_marker() == marker and len(line.get_xdata()) == 1]


def test_calibration_of_two_classes_by_hand():
    """Four slides at 0.1 and 0.2 (an edge belongs to the bin below), one at 0.95."""
    positive, labels = np.array([0.05, 0.15, 0.2, 0.2, 0.95]), np.array([0, 0, 1, 0, 1])
    figure = calibration(labels, np.stack([1 - positive, positive], axis=1), ("no", "yes"))
    axes, below = figure.axes
    points = [(*line.get_xdata(), *line.get_ydata()) for line in marks(figure)]
    assert points == [pytest.approx(point) for point in [(0.05, 0), (0.55 / 3, 1 / 3), (0.95, 1)]]
    intervals = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 2][1:]
    for interval, (hits, count) in zip(intervals, [(0, 1), (1, 3), (1, 1)], strict=True):
        expected = binomtest(hits, count).proportion_ci(method="wilson")
        assert list(interval) == pytest.approx([expected.low, expected.high])
    assert [bar.get_height() for bar in below.patches] == [1, 3, 0, 0, 0, 0, 0, 0, 0, 1]
    assert [text for text in texts(below) if text] == ["1", "3", "1"]
    figures = pooled_metrics(TASK, labels, np.stack([1 - positive, positive], axis=1), np.ones(5))
    assert f"Brier {figures['brier']:.3f}, ECE {figures['ece']:.3f}" in axes.get_title()


def test_bins_of_few_slides_are_drawn_hollow_and_the_legend_says_so():
    positive = np.array([0.05] * 9 + [0.55] * 10)
    scaled = np.clip(positive, 0.15, 1)
    figure = calibration(
        np.arange(19) % 2, np.stack([1 - positive, positive], axis=1), ("no", "yes"),
        calibrated=np.stack([1 - scaled, scaled], axis=1),
    )  # fmt: skip
    for marker in ("o", "s"):
        assert [line.get_markerfacecolor() == "white" for line in marks(figure, marker)] == [True, False]
    assert entries(figure) == [
        "perfect calibration", "as predicted, 95% interval", "calibrated, 95% interval",
        "hollow: fewer than 10 slides",
    ]  # fmt: skip
    figure.draw_without_rendering()
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_calibration_beyond_two_classes_is_of_the_predicted_one():
    labels, probabilities, names = np.array([0, 1, 2]), np.array([[0.75, 0.2, 0.05]] * 3), ("a", "b", "c")
    figure = calibration(labels, probabilities, names)
    (point,) = marks(figure)
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((0.75, 1 / 3))
    assert figure.axes[0].get_ylabel() == "Accuracy"


def test_repeats_do_not_make_calibration_surer():
    labels, probabilities, names = cohort(2)
    once = calibration(labels, probabilities, names)
    twice = calibration(np.tile(labels, 2), np.tile(probabilities, (2, 1)), names, repeats=np.repeat([1, 2], 40))
    for first, second in zip(once.axes[0].lines, twice.axes[0].lines, strict=True):
        assert second.get_ydata() == pytest.approx(first.get_ydata())
    assert [bar.get_height() for bar in twice.axes[1].patches] == [bar.get_height() for bar in once.axes[1].patches]


def test_the_positive_class_is_named_on_the_curves():
    for draw in (roc_figure, precision_recall_figure):
        title = draw(predictions(*cohort(2))).axes[0].get_title()
        assert "positive: class_1" in title
        title = draw(predictions(*cohort(3, 42))).axes[0].get_title()
        assert "each class against the rest" in title


@pytest.mark.parametrize("num_classes", [2, 3, 9])
def test_precision_and_recall_stand_over_chance(num_classes):
    labels, probabilities, names = cohort(num_classes, 81)
    figure = precision_recall_figure(predictions(labels, probabilities, names))
    shown = [1] if num_classes == 2 else range(num_classes)
    curves = [line for line in figure.axes[0].lines if line.get_label().startswith("class_")]
    for index, line, entry in zip(shown, curves, entries(figure), strict=True):
        truth, scores = (labels == index).astype(int), probabilities[:, index]
        found = pooled_metrics(TASK, truth, np.stack([1 - scores, scores], axis=1), np.ones(81))["average_precision"]
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(found)
        assert entry.startswith(f"class_{index}: AP {found:.3f} (95% CI ")
        assert entry.endswith(f"chance {truth.mean():.3f}")
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1]
    assert levels == pytest.approx([(labels == index).mean() for index in shown] if num_classes < 9 else [])


def test_precision_of_one_class_alone_is_said_to_be_undefined():
    _, probabilities, names = cohort(2)
    axes = precision_recall_figure(predictions(np.zeros(40, dtype=int), probabilities, names)).axes[0]
    assert not axes.lines
    assert "undefined" in axes.get_title()


@pytest.mark.parametrize("draw", [roc_figure, precision_recall_figure])
@pytest.mark.parametrize("count", [2, 9])
def test_a_legend_of_long_names_is_not_over_the_curves(draw, count, tmp_path):
    labels, probabilities, _ = cohort(count, 45)
    figure = draw(predictions(labels, probabilities, tuple(f"{LONG[index % 3]} {index}" for index in range(count))))
    save_figure(figure, tmp_path / "figure.png", dpi=int(figure.dpi))
    axes, legend = figure.axes[0], figure.legends[0].get_window_extent()
    assert legend.y1 < axes.xaxis.label.get_window_extent().y0
    assert 0 < legend.x0 < legend.x1 < figure.bbox.width
    assert axes.get_window_extent().width > 3 * figure.dpi  # inches


def test_saved_figures_are_pictures_and_nothing_stays_open(tmp_path):
    labels, probabilities, names = cohort(3)
    save_figure(roc(labels, probabilities, names), tmp_path / "a.png")
    save_figure(confusion(labels, probabilities, names), tmp_path / "b.png")
    save_figure(calibration(labels, probabilities, names), tmp_path / "c.png")
    for name in ("a.png", "b.png", "c.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_no_text_is_small_nor_a_formula(tmp_path):
    labels, probabilities, _ = cohort(9, 81)
    names = tuple(f"$x_{index}$ $" for index in range(9))
    figures = [
        roc(labels, probabilities, names),
        precision_recall_figure(predictions(labels, probabilities, names)),
        confusion(labels, probabilities, names),
        calibration(labels % 2, probabilities[:, :2], names[:2]),
    ]
    for number, figure in enumerate(figures):
        save_figure(figure, tmp_path / f"{number}.png", dpi=50)
        for text in figure.findobj(Text):
            assert text.get_fontsize() >= 8
            assert text.get_text().count("$") == text.get_text().count(r"\$")
