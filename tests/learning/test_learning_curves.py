"""The learning curves say of all trainings what is so of all of them."""

import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from tests.small import TASK
from utils.core.plots import save_figure
from utils.learning.learning_curves import learning_figure
from utils.tasks.survival import Survival


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def history(trainings: list[dict[str, list[float]]], setting: object = np.nan, per_fold: int = 4) -> pd.DataFrame:
    """Of inner trainings, so many for each outer fold, the columns epoch by epoch."""
    return pd.concat(
        [
            pd.DataFrame(columns).assign(
                fold=number // per_fold + 1, setting=setting, inner=number % per_fold + 1,
                epoch=np.arange(len(columns["val_loss"])) + 1,
            )
            for number, columns in enumerate(trainings)
        ],
        ignore_index=True,
    )  # fmt: skip


def flat(lengths: list[int], losses: list[float]) -> list[dict[str, list[float]]]:
    """Trainings whose losses and AUC never change."""
    return [
        {"train_loss": [loss / 2] * length, "val_loss": [loss] * length, "val_auc": [1 - loss] * length}
        for length, loss in zip(lengths, losses, strict=True)
    ]


def drawn(table: pd.DataFrame, monitor: str = "slide_auc", **others: str) -> Figure:
    monitors = dict.fromkeys(table["fold"].unique().tolist(), monitor)
    return learning_figure(
        TASK, table, monitors | {int(fold.removeprefix("fold_")): value for fold, value in others.items()}
    )


def bold(axes: Axes) -> list[Line2D]:
    """The means, each to where half of its trainings have ended, and then to the end."""
    return [line for line in axes.lines if line.get_linewidth() == 2.2]


def mean(axes: Axes, colour: int) -> dict[int, float]:
    """By epoch."""
    colours = list(dict.fromkeys(line.get_color() for line in bold(axes)))
    lines = [line for line in bold(axes) if line.get_color() == colours[colour]]
    return {int(x): float(y) for line in lines for x, y in zip(*line.get_data(), strict=True)}


def dots(axes: Axes) -> list[tuple[float, float]]:
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]


def entries(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_mean_of_flat_trainings_stays_flat_when_the_bad_ones_stop():
    lengths, losses = [60 - 2 * number for number in range(20)], np.linspace(0.05, 0.9, 20).tolist()
    losses_plot, auc_plot = drawn(history(flat(lengths, losses))).axes
    for axes, colour, level in ((losses_plot, 0, 0.2375), (losses_plot, 1, 0.475), (auc_plot, 0, 0.525)):
        found = mean(axes, colour)
        assert list(found) == list(range(42, 61)) + list(range(1, 42))  # every epoch, to that of the longest training
        assert list(found.values()) == pytest.approx([level] * 60)
        assert axes.get_xlim() == (1, 60)
        assert [line.get_alpha() for line in bold(axes)].count(0.5) == (2 if axes is losses_plot else 1)


def test_a_training_that_stopped_counts_with_its_last_value():
    trainings = [
        {"train_loss": [3.0, 1.0], "val_loss": [3.0, 1.0]},
        {"train_loss": [3.0, 3.0, 3.0, 5.0], "val_loss": [1.0, 1.0, 1.0, 1.0]},
    ]
    (axes,) = drawn(history(trainings), "slide_loss").axes
    assert mean(axes, 0) == {1: 3, 2: 2, 3: 2, 4: 3}
    caption = axes.figure.legends[0].get_title().get_text()
    assert "each carried on at its last value" in " ".join(caption.split())


def test_every_training_is_drawn_and_each_epoch_that_is_kept_is_marked():
    trainings = [
        {"train_loss": [0.9, 0.5, 0.4], "val_loss": [0.9, 0.7, 0.6], "val_auc": [0.6, 0.8, 0.8]},
        {"train_loss": [0.9, 0.5, 0.4], "val_loss": [0.3, 0.7, 0.8], "val_auc": [0.6, 0.6, 0.9]},
    ]
    losses, auc = drawn(history(trainings)).axes
    assert dots(auc) == [(3, 0.8), (3, 0.9)]  # of equal AUC, the lower loss
    assert dots(losses) == [(3, 0.6), (3, 0.8)]
    assert [len([line for line in axes.lines if line.get_linewidth() == 0.7]) for axes in (losses, auc)] == [4, 2]
    assert (auc.get_ylabel(), auc.get_title()) == ("Validation AUC", "")
    (alone,) = drawn(history(trainings), "slide_loss").axes
    assert dots(alone) == [(3, 0.6), (1, 0.3)]


def test_the_epoch_that_was_kept_is_marked_though_another_is_better():
    table = history([{"train_loss": [0.9, 0.5, 0.4], "val_loss": [0.9, 0.7, 0.8], "val_auc": [0.6, 0.9, 0.8]}])
    losses, auc = drawn(table.assign(kept=[False, False, True])).axes
    assert (dots(losses), dots(auc)) == ([(3, 0.8)], [(3, 0.8)])


def test_a_fold_that_fell_back_to_the_loss_is_marked_by_it():
    table = history(flat([2] * 4, [0.1, 0.2, 0.3, 0.4]), per_fold=2)
    table.loc[table["fold"] == 2, "val_auc"] = np.nan
    table.loc[(table["fold"] == 2) & (table["epoch"] == 2), "val_loss"] = 0.25
    losses, auc = drawn(table, fold_2="slide_loss").axes
    assert dots(auc) == [(1, 0.9), (1, 0.8)]
    assert dots(losses) == [(1, 0.1), (1, 0.2), (2, 0.25), (2, 0.25)]
    assert auc.get_title() == "(1 of 2 outer folds; in the others the loss chose)"
    assert list(mean(auc, 0).values()) == pytest.approx([0.85, 0.85])


@pytest.mark.parametrize(("monitor", "name"), [("slide_f1_macro", "macro F1"), ("slide_balanced_accuracy", "balanced")])
def test_the_figure_that_chose_is_named(monitor, name):
    table = history(flat([2, 2], [0.1, 0.2])).rename(columns={"val_auc": monitor.replace("slide_", "val_")})
    assert name in drawn(table, monitor).axes[1].get_ylabel()


@pytest.mark.parametrize("setting", [np.nan, None, "", "lr=0.1"])
def test_a_single_setting_has_both_losses_in_one_plot(setting):
    figure = drawn(history(flat([3, 3], [0.1, 0.2]), setting))
    assert entries(figure) == ["training, mean", "validation, mean"]
    assert figure.get_suptitle() == "2 inner trainings"


@pytest.mark.parametrize("settings", [1, 3])
def test_a_wild_loss_leaves_the_plot_to_the_others_and_that_is_said(settings, tmp_path):
    """The dot at the epoch kept, which is not clipped where it is in the plot, too."""
    wild = [{"train_loss": [0.7, 1e17], "val_loss": [1e9, 1e17], "val_auc": [0.5, 0.6]}] * 2
    tame = flat([2] * 6, [0.7] * 6)
    if settings == 1:
        figure = drawn(history(tame + wild))
        losses, auc = figure.axes
    else:
        table = pd.concat([history(tame[:2], "lr=1e-4"), history(wild, "lr=1"), history(wild, "lr=0.5")])
        figure = drawn(table)
        _, losses, auc = figure.axes
    how_many = "2 of 8" if settings == 1 else "4 of 6"
    assert losses.get_title() == f"(cut off above: {how_many} trainings, up to 1e+17, and their mean)"
    assert 0.7 < losses.get_ylim()[1] < 0.75
    outside = [line for line in losses.lines if np.max(line.get_ydata()) > 1]
    assert outside
    assert all(line.get_clip_on() for line in outside)
    assert auc.get_title() == ""
    save_figure(figure, tmp_path / "curves.png")


@pytest.mark.parametrize("losses", [[0.01, 0.7], [0.7, 5.0], [1e9, 2e9]])
def test_a_loss_that_is_merely_larger_is_drawn_whole(losses):
    for table in (
        history(flat([2, 2], losses)),
        pd.concat([history(flat([2, 2], [loss] * 2), f"lr={loss}") for loss in losses]),
    ):
        axes = drawn(table, "slide_loss").axes[-1]
        assert axes.get_title() == ""
        assert axes.get_ylim()[1] >= max(losses)


def test_refits_are_left_out():
    table = history(flat([2, 2], [0.1, 0.2]))
    refit = pd.DataFrame({"fold": 1, "setting": "", "inner": 0, "epoch": range(1, 6), "train_loss": 100.0})
    figure = drawn(pd.concat([table, refit]))
    assert figure.get_suptitle() == "2 inner trainings"
    assert max(line.get_ydata().max() for line in figure.axes[0].lines) == 0.2
    assert figure.axes[0].get_xlim() == (1, 2)


def test_settings_are_drawn_in_the_order_in_which_inner_validation_puts_them():
    """The setting of the lowest loss has the lowest AUC, and is one of the two that are not drawn."""
    aucs = {f"lr={number}": 0.5 + 0.05 * number for number in range(8)}
    table = pd.concat(
        [
            history([{"train_loss": [auc] * 3, "val_loss": [auc] * 3, "val_auc": [0.1, auc, 0.2]}] * 4, name, 2)
            for name, auc in aucs.items()
        ]
    )
    # The first fold chooses another one than the second.
    table.loc[(table["setting"] == "lr=1") & (table["fold"] == 1) & (table["epoch"] == 2), "val_auc"] = 0.99
    figure = drawn(table)
    assert [axes.get_ylabel() for axes in figure.axes] == ["Training loss", "Validation loss", "Validation AUC"]
    assert [entry.split(",")[0] for entry in entries(figure)] == [f"lr={number}" for number in (7, 1, 6, 5, 4, 3)]
    assert [entry.split("chosen in ")[1] for entry in entries(figure)[:3]] == [
        "1 of 2 folds)", "1 of 2 folds)", "0 of 2 folds)",
    ]  # fmt: skip
    assert "drawn are the 6 that inner validation puts first" in figure.get_suptitle()
    for axes in figure.axes:
        assert len(bold(axes)) == 2 * 6
    assert len(dots(figure.axes[2])) == 4 * 6
    assert not dots(figure.axes[0])


def test_a_setting_of_which_trainings_diverged_comes_last_and_says_so():
    """They have no history; what is left of the setting is better than all others, and was chosen nowhere."""
    good, steady = (history(flat([3] * 4, [loss] * 4), name, 2) for name, loss in (("lr=1", 0.1), ("lr=0.1", 0.5)))
    partly = good[(good["fold"] == 1) & (good["inner"] == 1)]
    figure = drawn(pd.concat([partly, steady]))
    assert entries(figure) == [
        "lr=0.1, mean (chosen in 2 of 2 folds)",
        "lr=1, mean (chosen in 0 of 2 folds, without the 3 of 4 trainings that diverged)",
    ]


@pytest.mark.parametrize("settings", [1, 2])
def test_a_single_epoch_and_a_single_training_draw(settings, tmp_path):
    for lengths in ([1], [1, 1], [7]):
        table = pd.concat([history(flat(lengths, [0.2] * len(lengths)), f"lr={number}") for number in range(settings)])
        figure = drawn(table)
        save_figure(figure, tmp_path / "curves.png", dpi=50)
        assert figure.axes[0].get_xlim() == ((1, 7) if lengths == [7] else (0.5, 1.5))


def test_no_text_is_small_nor_a_formula():
    figure = drawn(pd.concat([history(flat([2], [0.2]), f"lr=$\\{index}$") for index in range(2)]))
    for text in figure.findobj(Text):
        assert text.get_fontsize() >= 8
        assert text.get_text().count("$") == text.get_text().count(r"\$")


def test_two_different_losses_do_not_share_an_axis():
    """Survival counts bins of time in training, and the intervals between its times in validation."""
    table = history(flat([3, 3], [0.8, 0.9]), per_fold=2).rename(columns={"val_auc": "val_c_index"})
    task = Survival("days", "died", bins=4, times=(1.0, 2.0, 3.0))
    figure = learning_figure(task, table, {1: "slide_loss"})
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "Training loss, of 4 bins of time", "Validation loss, of 4 intervals",
    ]  # fmt: skip
    assert [len(dots(axes)) for axes in figure.axes] == [0, 2], "the kept epochs are those of validation"
    several = pd.concat([table.assign(setting="a"), table.assign(setting="b")])
    figure = learning_figure(task, several, {1: "slide_loss"})
    assert [axes.get_ylabel().split(",")[0] for axes in figure.axes] == ["Training loss", "Validation loss"]
