"""What a run would take, told before it begins."""

import re

import numpy as np
import pytest

from tests.learning.runs import make_cv, small
from utils.learning import dry_run
from utils.mil_dataset import MILDataset


class TestDryRun:
    def test_says_what_a_run_would_do_and_does_nothing(self, dataset, tmp_path):
        cv = make_cv(dataset, tmp_path / "run", grid="lr=1e-3,1e-2", epochs=7)
        said = cv.dry_run()
        assert not (tmp_path / "run").exists()
        tests = [line.split() for line in said.splitlines() if "test" in line]
        assert [line[:2] for line in tests] == [["fold", "1:"], ["fold", "2:"], ["fold", "3:"]]
        assert sum(int(line[3]) for line in tests) == sum(int(line[5]) for line in tests) == 12
        assert "12 inner trainings of at most 7 epochs" in said
        assert "time: about" in said
        assert "GB free" in said
        assert "memory: about" in said
        refit = make_cv(dataset, tmp_path / "run", grid="lr=1e-3,1e-2", epochs=7, final="refit").dry_run()
        assert "12 inner trainings of at most 7 epochs, 3 refits" in refit
        everything = make_cv(dataset, tmp_path / "run", epochs=7, final="all").dry_run()
        assert "6 inner trainings of at most 7 epochs, one on all slides" in everything

    def test_the_largest_step_of_the_run_is_taken(self, cohort, tmp_path, monkeypatch):
        steps = []
        monkeypatch.setattr(dry_run.ModelTraining, "step", lambda _, *step: steps.append(step))
        data = MILDataset(*cohort, mode="full", cache="ram")
        make_cv(data, tmp_path / "run", batch_size=3).dry_run()
        sizes = np.array([info.num_instances for info in data.info])
        (slides, batch_size), *_ = steps
        assert batch_size == 3
        assert sorted(sizes[slides]) == sorted(sizes)[-3:]
        make_cv(MILDataset(*cohort, mode="full", cache="off"), tmp_path / "run", batch_size=3).dry_run()
        assert len(steps[1][0]) == len(data), "what is read from files beside the batch"

    def test_a_setting_that_diverges_is_tried_all_the_same(self, dataset, tmp_path, monkeypatch):
        monkeypatch.setattr("utils.learning.training.learning_rate", lambda *_: 1e30)
        assert "12 inner trainings" in make_cv(dataset, tmp_path / "run", grid="lr=1e-2,1").dry_run()


class TestLargeSlides:
    @pytest.mark.parametrize(("free", "level"), [(10**12, "INFO"), (10**5, "WARNING")])
    def test_what_their_step_takes_is_said_at_the_start(
        self, free, level, cohort, tmp_path, unfitted, monkeypatch, aloud
    ):
        monkeypatch.setattr(dry_run, "MANY_PATCHES", 100)
        monkeypatch.setattr(dry_run, "FORECAST_ROWS", (32, 64))
        monkeypatch.setattr(dry_run, "free_memory", lambda _: free)
        make_cv(MILDataset(*cohort, mode="full"), tmp_path / "run", lambda: small("TransMIL")).run()
        (record,) = [record for record in aloud.records if "TransMIL on whole slides" in record.getMessage()]
        assert re.search(r"\(8 slides, \d+ patches\) takes about \d+ seconds? and 0?\.?\d+.* MB", record.getMessage())
        assert record.levelname == level
        assert ("MB free)" in record.getMessage()) is (level == "WARNING")

    def test_chunks_and_small_slides_need_no_word(self, dataset, cohort, tmp_path, unfitted, monkeypatch, aloud):
        make_cv(MILDataset(*cohort, mode="full"), tmp_path / "full").run()
        monkeypatch.setattr(dry_run, "MANY_PATCHES", 1)
        make_cv(dataset, tmp_path / "chunked").run()
        assert "on whole slides" not in aloud.text
