import numpy as np
import pytest

from utils.core.errors import ConfigError
from utils.learning.grid import Setting, grid_settings, read_grid


class TestGrid:
    def test_names_and_values_in_the_types_they_need(self):
        grid = read_grid("lr=1e-4,3e-4 hidden_dim=128,256 dropout=0", "LiteMIL")
        assert grid == {"lr": (1e-4, 3e-4), "hidden_dim": (128, 256), "dropout": (0.0,)}
        assert [type(values[0]) for values in grid.values()] == [float, int, float]
        assert read_grid("batch_size=8,16", "LiteMIL") == {"batch_size": (8, 16)}
        assert read_grid("gated=true,False", "ABMIL") == {"gated": (True, False)}

    def test_settings_are_all_combinations_told_apart(self):
        settings = grid_settings({"lr": (1e-4, 3e-4), "hidden_dim": (128, 256)}, "LiteMIL")
        assert [str(setting) for setting in settings] == [
            "lr=0.0001 hidden_dim=128", "lr=0.0001 hidden_dim=256", "lr=0.0003 hidden_dim=128",
            "lr=0.0003 hidden_dim=256",
        ]  # fmt: skip
        assert settings[1] == Setting({"lr": 1e-4}, {"hidden_dim": 256})
        assert settings[1].values == {"lr": 1e-4, "hidden_dim": 256}

    def test_values_of_numpy_are_numbers_like_others(self):
        (low, high) = grid_settings({"lr": np.array([0.25, 0.5])}, "LiteMIL")
        assert (str(low), str(high)) == ("lr=0.25", "lr=0.5")
        assert grid_settings({"epochs": [np.int64(3)]}, "LiteMIL") == [Setting({"epochs": 3})]

    def test_no_grid_is_one_setting_that_changes_nothing(self):
        assert grid_settings({}, "LiteMIL") == [Setting({}, {})]
        assert str(Setting()) == ""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "empty"),
            ("lr", "--grid lr: not understood"),
            ("lr=1e-4 lr=1e-3", "--grid lr=1e-3: not understood; write each name once"),
            ("lr=abc", "--grid lr='abc': expected a number"),
            ("lr=", "--grid lr='': expected a number"),
            ("lr=1e-3,1e10", "--grid lr=10000000000.0: out of range; give a number from 1e-08 to 1"),
            ("lr=0", "--grid lr=0.0: out of range"),
            ("dropout=0.5,2", "--grid dropout=2.0: out of range"),
            ("hidden_dim=1000000000", "--grid hidden_dim=1000000000: out of range"),
            ("batch_size=0", "--grid batch_size=0: out of range"),
            ("hidden_dim=1.5", "--grid hidden_dim='1.5': expected a whole number"),
            ("gated=maybe", "--grid gated='maybe': expected True or False"),
            ("epoch=3", "--grid epoch: no hyperparameter of .*; did you mean epochs"),
            (
                "num_queries=1,4",
                "--grid num_queries: no hyperparameter of training or ABMIL; these are: epochs, .*gated",
            ),
            ("precision=fp16", "--grid precision: no hyperparameter"),
            ("seed=1,2", "--grid seed: no hyperparameter"),
        ],
    )
    def test_what_is_no_grid(self, text, message):
        with pytest.raises(ConfigError, match=message):
            grid_settings(read_grid(text, "ABMIL"), "ABMIL")

    @pytest.mark.parametrize(
        ("grid", "message"),
        [
            ({"lr": ()}, "--grid lr: give a list of values, at least one"),
            ({"lr": 1e-3}, "--grid lr: give a list of values, at least one; found 0.001"),
            ({"lr": "1e-3"}, "--grid lr: give a list of values"),
            ({"lr": (1e-4, 1e-4)}, "--grid lr: give each value once"),
            ({"lr": ["1e-3"]}, "--grid lr='1e-3': expected a number"),
            ({"lr": [None]}, "--grid lr=None: expected a number"),
            ({"lr": [[1]]}, r"--grid lr=\[1\]: expected a number"),
            ({"epochs": [2.5]}, "--grid epochs=2.5: expected a whole number"),
            ({"epochs": [True]}, "--grid epochs=True: expected a whole number"),
        ],
    )
    def test_values_from_python_that_cannot_be(self, grid, message):
        with pytest.raises(ConfigError, match=message):
            grid_settings(grid, "LiteMIL")


def test_a_grid_is_names_and_values():
    with pytest.raises(ConfigError, match=r"--grid 'lr=1': expected names and values"):
        grid_settings("lr=1", "LiteMIL")  # type: ignore[arg-type]
