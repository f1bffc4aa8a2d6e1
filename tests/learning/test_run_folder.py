import multiprocessing
import os
from pathlib import Path

import pytest

from tests.learning.runs import TRAININGS, assert_same, contents, leave_unfinished, make_cv
from utils.core.errors import ConfigError
from utils.core.files import read_json
from utils.learning.run_folder import RunFolder


def hold(path: Path, ready, go) -> None:
    with RunFolder(path).locked():
        ready.set()
        go.wait(30)
        os._exit(1)  # without letting go of anything


def test_another_process_is_kept_out_until_it_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "a" / "run", ready, go))
    process.start()
    assert ready.wait(30)
    with (
        pytest.raises(ConfigError, match="another process is training into this folder"),
        RunFolder(tmp_path / "a" / "run").locked(),
    ):
        pytest.fail("was let in")
    with RunFolder(tmp_path / "a" / "other").locked():
        pass
    go.set()
    process.join(30)
    with RunFolder(tmp_path / "a" / "run").locked():
        pass
    assert not list((tmp_path / "a").iterdir())


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with RunFolder(tmp_path / "run").locked():
        pass


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"cannot be written .*give another --output_dir"),
        RunFolder(tmp_path / "file" / "run").locked(),
    ):
        pytest.fail("was let in")


def test_a_record_that_is_none(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not the record of a training run"):
        RunFolder(tmp_path).take({}, dict)


def test_finished_says_so_to_the_next(tmp_path):
    folder = RunFolder(tmp_path / "run")
    fresh = {"identity": {"seed": 1}, "argv": ["train.py"], "finished": False}
    assert folder.take({"seed": 1}, lambda: {"argv": ["train.py"]}) == fresh
    assert RunFolder(tmp_path / "run").take({"seed": 1}, lambda: {"argv": ["again.py"]}) == fresh
    folder.finish({"argv": ["train.py"]})
    assert RunFolder(tmp_path / "run").take({"seed": 1}, dict)["finished"]
    assert read_json(tmp_path / "run" / "run.json") == {"identity": {"seed": 1}, "argv": ["train.py"], "finished": True}
    assert not RunFolder(tmp_path / "run").take({"seed": 2}, dict)["finished"]
    assert read_json(tmp_path / "run.1" / "run.json")["identity"] == {"seed": 1}


class TestFolder:
    def test_each_old_run_keeps_its_own_folder(self, dataset, tmp_path, unfitted):
        kept = []
        for seed in (1, 2, 3):
            make_cv(dataset, tmp_path / "run", seed=seed).run()
            kept.append(contents(tmp_path / "run"))
        for folder, expected in zip(("run.1", "run.2", "run"), kept, strict=True):
            assert_same(contents(tmp_path / folder), expected)

    def test_an_unfinished_run_of_another_configuration_is_moved_whole(self, dataset, tmp_path, unfitted):
        leave_unfinished(make_cv(dataset, tmp_path / "run", seed=1))
        make_cv(dataset, tmp_path / "run", seed=2).run()
        assert len(list((tmp_path / "run.1" / "resume").glob("*.pt"))) == TRAININGS

    def test_a_folder_that_is_not_a_run_is_left_alone(self, dataset, tmp_path, unfitted):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("years of work")
        with pytest.raises(ConfigError, match="not empty and not a training run; give another --output_dir"):
            make_cv(dataset, tmp_path / "run").run()
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
        assert not unfitted.states

    def test_an_empty_folder_will_do(self, dataset, tmp_path, unfitted):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".DS_Store").write_text("")
        make_cv(dataset, tmp_path / "run").run()
        assert (tmp_path / "run" / "outputs.json").is_file()


class TestResume:
    def test_a_finished_run_killed_before_it_tidied_up_is_tidied_up(self, dataset, tmp_path, monkeypatch, unfitted):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "clear_leftovers", lambda _: None)
            make_cv(dataset, tmp_path / "run").run()
        (tmp_path / "run" / ".outputs.json.x.part").write_text("half")
        assert (tmp_path / "run" / "resume").is_dir()
        make_cv(dataset, tmp_path / "run").run()
        assert not (tmp_path / "run" / "resume").exists()
        assert not (tmp_path / "run" / ".outputs.json.x.part").exists()
