"""Trainings whose workers die, or run out of memory."""

from contextlib import nullcontext

import pytest

from tests.learning.runs import TRAININGS, make_cv
from utils.core.engine import Processes, WorkerDied
from utils.core.errors import EngineError
from utils.learning import cross_validation, jobs
from utils.mil_dataset import MILDataset


class TestWorkersThatDie:
    """Of a training each, the first always."""

    @pytest.fixture
    def engine(self, monkeypatch):
        class Mortal(Processes):
            deaths, for_good = 2, False

            def run(self, work, tasks, on_message) -> None:
                for times in range(1, self.deaths + 1):
                    on_message(tasks[0], {"epoch": 1, "lr": 0.1})
                    on_message(
                        tasks[0],
                        WorkerDied(times, self.for_good and times == self.deaths, "node7", 321, workers_left=3),
                    )
                super().run(work, tasks[self.for_good :], on_message)

        monkeypatch.setattr(cross_validation, "open_engine", lambda *_: nullcontext(Mortal()))
        return Mortal

    def test_the_training_is_done_again_aloud(self, engine, dataset, tmp_path, unfitted, aloud, capsys):
        cv = make_cv(dataset, tmp_path)
        cv.run()
        told = [message for message in aloud.messages if "it is trained again, 3 at a time" in message]
        assert len(told) == 2
        assert "its worker process on node7 was lost (2 times now)" in told[1]
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"trainings={TRAININGS}/{TRAININGS}" in last
        assert "0epoch" in last, "what was done before the loss is taken back"

    def test_one_that_is_lost_for_good_ends_the_run_when_the_others_are_trained(
        self, engine, dataset, tmp_path, unfitted, monkeypatch
    ):
        monkeypatch.setattr(engine, "for_good", True)
        with pytest.raises(
            EngineError,
            match=r"^fold_1_setting_1_inner_1: .*\(2 times now\).*it needs more memory, .* \(what is finished",
        ):
            make_cv(dataset, tmp_path).run()
        assert len(list((tmp_path / "resume").glob("fold_*.pt"))) == TRAININGS - 1

    def test_memory_that_runs_out_is_one_line_with_what_takes_less(self, cohort, tmp_path, unfitted, monkeypatch):
        def run_out(*_, **__):
            raise MemoryError

        monkeypatch.setattr(jobs, "fit", run_out)
        for mode, less in (
            ("chunked", "--batch_size, --chunk_size or"),
            ("full", "or --hidden_dim, or --mode chunked"),
        ):
            told = rf"^fold_1_setting_1_inner_1: it ran out of memory; it needs more memory, or a smaller .*{less}"
            with pytest.raises(EngineError, match=told):
                make_cv(MILDataset(*cohort, mode=mode), tmp_path / mode).run()
