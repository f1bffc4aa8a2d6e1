import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from utils.learning.figures import COLOURS, confusion_figure, learning_figure, roc_figure, save_figure


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def cohort(num_classes: int, count: int = 40) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % num_classes
    probabilities = rng.dirichlet(np.ones(num_classes), size=count)
    return (
        labels,
        probabilities,
        tuple(f"class_{i}" for i in range(num_classes)),
        np.arange(count) // num_classes % 3 + 1,
    )


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(("num_classes", "curves"), [(2, 1), (3, 3), (9, 9)])
def test_roc_has_a_curve_per_class_and_fold(num_classes, curves, tmp_path):
    labels, probabilities, names, folds = cohort(num_classes, 81)
    axes = roc_figure(labels, probabilities, names, folds).axes[0]
    entries = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(entries) == curves
    assert len(axes.lines) == curves * (3 + 1) + 1  # each fold, pooled; the diagonal
    assert len(COLOURS) < 9  # so that nine classes show whether one is dropped


def test_roc_names_the_pooled_auc():
    labels = np.array([0, 1, 0, 1])
    positive = np.array([0.1, 0.9, 0.6, 0.5])
    figure = roc_figure(labels, np.stack([1 - positive, positive], axis=1), ("no", "yes"), np.ones(4))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["yes: AUC 0.750"]


def test_roc_leaves_out_folds_of_one_class():
    labels, probabilities, names, _ = cohort(2)
    axes = roc_figure(labels, probabilities, names, labels + 1).axes[0]
    assert len(axes.lines) == 2


def test_roc_of_one_class_alone_is_empty(tmp_path):
    _, probabilities, names, folds = cohort(2)
    save_figure(roc_figure(np.zeros(40, dtype=int), probabilities, names, folds), tmp_path / "roc.png")


@pytest.mark.parametrize("num_classes", [2, 3])
def test_confusion_counts_slides(num_classes):
    labels, probabilities, names, _ = cohort(num_classes)
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


def history(lengths: list[int]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"fold": 1, "inner": inner, "epoch": epoch, "train_loss": inner / epoch, "val_loss": 1.0}
            for inner, length in enumerate(lengths, start=1)
            for epoch in range(1, length + 1)
        ]
    )


def test_learning_curves_stop_their_mean_where_most_trainings_have_ended():
    axes = learning_figure(history([2, 4, 4, 9])).axes[0]
    mean = next(line for line in axes.lines if line.get_label() == "training (mean)")
    assert list(mean.get_xdata()) == [1, 2, 3, 4]
    assert list(mean.get_ydata()) == pytest.approx([2.5, 1.25, 1.0, 0.75])
    assert len(axes.lines) == 2 * (4 + 1)


def test_a_single_epoch_draws(tmp_path):
    save_figure(learning_figure(history([1])), tmp_path / "curves.png")


def test_saved_figures_are_pictures_and_nothing_stays_open(tmp_path):
    labels, probabilities, names, folds = cohort(3)
    save_figure(roc_figure(labels, probabilities, names, folds), tmp_path / "a.png")
    save_figure(confusion_figure(labels, probabilities, names), tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_equal_figures_are_equal_bytes(tmp_path):
    labels, probabilities, names, folds = cohort(2)
    for name in ("a.png", "b.png"):
        save_figure(roc_figure(labels, probabilities, names, folds), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
