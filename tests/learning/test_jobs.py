"""One training of a run: its settings, and the file that keeps it."""

import logging

import pandas as pd
import pytest
import torch

from tests.learning.runs import assert_same, contents, leave_unfinished, make_cv
from utils.learning import jobs
from utils.prediction.checkpoint import load_checkpoint


class TestGrid:
    def test_settings_of_training_and_model_reach_both(self, dataset, tmp_path, monkeypatch, no_figures):
        fit, seen = jobs.fit, []

        def spying(factory, data, train, val, settings, **named):
            seen.append((settings.lr, settings.batch_size, factory().spec["hidden_dim"], named["seed"]))
            return fit(factory, data, train, val, settings, **named)

        monkeypatch.setattr(jobs, "fit", spying)
        cv = make_cv(dataset, tmp_path, n_outer=2, epochs=1, grid={"hidden_dim": (8, 16), "lr": (1e-3, 1e-2)})
        results = cv.run()
        expected = [(lr, 8, dim) for dim in (8, 16) for lr in (1e-3, 1e-2) for _ in range(2)] * 2
        assert [call[:3] for call in seen] == expected
        assert len({call[3] for call in seen}) == len(seen)
        for fold in results["fold_results"]:
            checkpoint = load_checkpoint(tmp_path / f"fold_{fold['fold']}_best.pth")
            assert checkpoint.model["hidden_dim"] == fold["selection"]["setting"]["hidden_dim"]
        history = pd.read_csv(tmp_path / "history.csv")
        assert history.groupby(["fold", "setting", "inner"]).ngroups == len(history) == 16
        assert set(history["setting"]) == {f"lr={lr} hidden_dim={dim}" for lr in (0.001, 0.01) for dim in (8, 16)}


class TestResume:
    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "tensor", "lacking"])
    def test_a_damaged_resume_file_is_trained_again_aloud(
        self, damage, dataset, tmp_path, monkeypatch, unfitted, aloud
    ):
        make_cv(dataset, tmp_path / "whole").run()
        calls = len(unfitted.states)
        leave_unfinished(make_cv(dataset, tmp_path / "run"))
        path = tmp_path / "run" / "resume" / "fold_2_setting_1_inner_1.pt"
        content = path.read_bytes()
        if damage == "tensor":
            torch.save(torch.zeros(2), path)
        elif damage == "lacking":
            torch.save({"state_dict": {}}, path)
        else:
            path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
        unfitted.states.clear()
        make_cv(dataset, tmp_path / "run").run()
        assert len(unfitted.states) == 1 < calls
        assert_same(contents(tmp_path / "run"), contents(tmp_path / "whole"))
        warnings = [record.getMessage() for record in aloud.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert str(path) in warnings[0]
        assert "is done again" in warnings[0]
