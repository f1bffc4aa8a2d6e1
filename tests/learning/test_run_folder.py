import multiprocessing
import os
from pathlib import Path

import pytest

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
