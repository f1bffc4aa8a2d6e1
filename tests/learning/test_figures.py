import sys
import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from PIL import Image
from scipy.stats import binomtest

from utils.learning.figures import (
    COLOURS,
    STYLES,
    calibration_figure,
    confusion_figure,
    learning_figure,
    roc_figure,
    save_figure,
)
from utils.learning.statistics import bootstrap_intervals, pooled_metrics

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


def roc(labels: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...], folds=None, repeats=None) -> Figure:
    """Each slide of a patient of its own, in three folds, once."""
    count = len(labels)
    folds = np.arange(count) // len(names) % 3 + 1 if folds is None else folds
    repeats = np.ones(count, dtype=int) if repeats is None else repeats
    cases = np.array([f"P{index % (count // len(np.unique(repeats)))}" for index in range(count)])
    return roc_figure(labels, probabilities, names, folds, cases, repeats, 0)


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def entries(legend: Legend | None) -> list[str]:
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize(("num_classes", "curves"), [(2, 1), (3, 3), (9, 9)])
def test_roc_has_a_curve_per_class(num_classes, curves):
    """With a band and a curve of each fold, but not for nine classes."""
    axes = roc(*cohort(num_classes, 81)).axes[0]
    assert len(entries(axes.get_legend())) == curves
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
    cases, repeats = np.array([f"P{index}" for index in range(40)]), np.ones(40)
    auc = pooled_metrics(labels, probabilities, repeats)["auc"]
    low, high = bootstrap_intervals(labels, probabilities, cases, 0)["auc"]
    found = entries(roc(labels, probabilities, names).axes[0].get_legend())
    assert found == [f"class_1: AUC {auc:.3f} (95% CI {low:.3f} to {high:.3f})"]


def test_roc_of_repeats_is_their_mean():
    labels, positive = np.array([0, 1, 0, 1] * 2), np.array([0.1, 0.9, 0.2, 0.8, 0.9, 0.1, 0.8, 0.2])
    answers = (labels, np.stack([1 - positive, positive], axis=1), ("no", "yes"))
    axes = roc(*answers, folds=np.repeat([1, 2], 4), repeats=np.repeat([1, 2], 4)).axes[0]
    mean = axes.lines[2]
    assert set(mean.get_ydata()[1:-1]) == {0.5}  # one repeat ranks all rightly, the other all wrongly
    assert "AUC 0.500" in entries(axes.get_legend())[0]
    assert "mean of 2 repeats" in axes.get_title()


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
    axes = confusion_figure(labels, probabilities, names).axes[0]
    predicted = probabilities.argmax(axis=1)
    for text in axes.texts:
        column, row = text.get_position()
        count = int(((labels == row) & (predicted == column)).sum())
        assert text.get_text() == f"{count}\n{count / (labels == row).sum():.0%}"
    assert len(axes.texts) == num_classes**2
    assert [label.get_text() for label in axes.get_xticklabels()] == list(names)


def test_confusion_of_a_class_without_slides():
    assert texts(confusion_figure(np.array([0, 0]), np.array([[0.9, 0.1], [0.2, 0.8]]), ("no", "yes")).axes[0]) == [
        "1\n50%",
        "1\n50%",
        "0\n0%",
        "0\n0%",
    ]


def test_confusion_counts_every_repeat():
    labels, probabilities, names = cohort(2)
    twice = confusion_figure(np.tile(labels, 2), np.tile(probabilities, (2, 1)), names, np.repeat([1, 2], 40)).axes[0]
    assert "slides x 2 repeats" in twice.get_title()
    assert sum(int(text.split("\n")[0]) for text in texts(twice)) == 80


@pytest.mark.parametrize("count", [2, 3, 9])
def test_long_class_names_do_not_overlap(count):
    """Unrotated labels by their boxes; slanted ones by the distance of the parallel lines they stand on."""
    names = tuple(f"{LONG[index % 3]} {index}" for index in range(count))
    labels, probabilities, _ = cohort(count, 45)
    figure = confusion_figure(labels, probabilities, names)
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


def test_calibration_of_two_classes_by_hand():
    """Four slides at 0.1 and 0.2 (an edge belongs to the bin below), one at 0.95."""
    positive, labels = np.array([0.05, 0.15, 0.2, 0.2, 0.95]), np.array([0, 0, 1, 0, 1])
    figure = calibration_figure(labels, np.stack([1 - positive, positive], axis=1), ("no", "yes"))
    axes, below = figure.axes
    points = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]
    assert points == [pytest.approx(point) for point in [(0.05, 0), (0.55 / 3, 1 / 3), (0.95, 1)]]
    intervals = [line.get_ydata() for line in axes.lines if line.get_marker() != "o"][1:]
    for interval, (hits, count) in zip(intervals, [(0, 1), (1, 3), (1, 1)], strict=True):
        expected = binomtest(hits, count).proportion_ci(method="wilson")
        assert list(interval) == pytest.approx([expected.low, expected.high])
    assert [bar.get_height() for bar in below.patches] == [1, 3, 0, 0, 0, 0, 0, 0, 0, 1]
    figures = pooled_metrics(labels, np.stack([1 - positive, positive], axis=1), np.ones(5))
    assert f"Brier {figures['brier']:.3f}, ECE {figures['ece']:.3f}" in axes.get_title()


def test_calibration_beyond_two_classes_is_of_the_predicted_one():
    labels, probabilities, names = np.array([0, 1, 2]), np.array([[0.75, 0.2, 0.05]] * 3), ("a", "b", "c")
    axes = calibration_figure(labels, probabilities, names).axes[0]
    (point,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((0.75, 1 / 3))
    assert axes.get_ylabel() == "Accuracy"


def test_repeats_do_not_make_calibration_surer():
    labels, probabilities, names = cohort(2)
    once = calibration_figure(labels, probabilities, names)
    twice = calibration_figure(np.tile(labels, 2), np.tile(probabilities, (2, 1)), names, np.repeat([1, 2], 40))
    for first, second in zip(once.axes[0].lines, twice.axes[0].lines, strict=True):
        assert second.get_ydata() == pytest.approx(first.get_ydata())
    assert [bar.get_height() for bar in twice.axes[1].patches] == [bar.get_height() for bar in once.axes[1].patches]


def history(lengths: list[int], setting: object = np.nan, scale: float = 1.0) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"fold": 1, "setting": setting, "inner": inner, "epoch": epoch, "train_loss": scale * inner / epoch}
            | {"val_loss": scale}
            for inner, length in enumerate(lengths, start=1)
            for epoch in range(1, length + 1)
        ]
    )


@pytest.mark.parametrize("setting", [np.nan, None, "", "lr=0.1"])
def test_a_single_setting_has_its_trainings_drawn(setting):
    axes = learning_figure(history([3, 3], setting)).axes[0]
    assert len(axes.lines) == 2 * (2 + 1)
    assert axes.get_title() == "2 inner trainings"


def test_refits_are_left_out():
    refit = history([5]).assign(inner=0, train_loss=100.0, val_loss=np.nan)
    axes = learning_figure(pd.concat([refit, history([2, 2])])).axes[0]
    assert max(line.get_ydata().max() for line in axes.lines) == 2
    assert len(axes.lines) == 2 * (2 + 1)


@pytest.mark.parametrize("count", [2, 8])
def test_settings_are_compared_by_their_means(count):
    """The six of lowest validation loss, in the same colours on both sides."""
    figure = learning_figure(pd.concat([history([2, 4], f"lr={index}", count - index) for index in range(count)]))
    drawn = min(count, 6)
    for axes in figure.axes:
        assert len(axes.lines) == drawn
    expected = [f"lr={index}" for index in reversed(range(count))][:drawn]
    assert entries(figure.legends[0]) == expected
    assert [line.get_ydata()[0] for line in figure.axes[1].lines] == list(range(1, drawn + 1))
    assert ("of 8 those" in figure.get_suptitle()) == (count == 8)


def test_learning_curves_stop_their_mean_where_most_trainings_have_ended():
    axes = learning_figure(history([2, 4, 4, 9])).axes[0]
    mean = next(line for line in axes.lines if line.get_label() == "training (mean)")
    assert list(mean.get_xdata()) == [1, 2, 3, 4]
    assert list(mean.get_ydata()) == pytest.approx([2.5, 1.25, 1.0, 0.75])
    assert len(axes.lines) == 2 * (4 + 1)


def test_a_single_epoch_draws(tmp_path):
    save_figure(learning_figure(history([1])), tmp_path / "curves.png")


def test_saved_figures_are_pictures_and_nothing_stays_open(tmp_path):
    labels, probabilities, names = cohort(3)
    save_figure(roc(labels, probabilities, names), tmp_path / "a.png")
    save_figure(confusion_figure(labels, probabilities, names), tmp_path / "b.png")
    save_figure(calibration_figure(labels, probabilities, names), tmp_path / "c.png")
    for name in ("a.png", "b.png", "c.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_equal_figures_are_equal_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_figure(roc(*cohort(2)), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_text_is_small_nor_a_formula(tmp_path):
    labels, probabilities, _ = cohort(9, 81)
    names = tuple(f"$x_{index}$ $" for index in range(9))
    grid = pd.concat([history([2], f"lr=$\\{index}$") for index in range(2)])
    figures = [
        roc(labels, probabilities, names),
        confusion_figure(labels, probabilities, names),
        calibration_figure(labels % 2, probabilities[:, :2], names[:2]),
        learning_figure(grid),
    ]
    for number, figure in enumerate(figures):
        save_figure(figure, tmp_path / f"{number}.png")
        for text in figure.findobj(Text):
            assert text.get_fontsize() >= 8
            assert text.get_text().count("$") == text.get_text().count(r"\$")
