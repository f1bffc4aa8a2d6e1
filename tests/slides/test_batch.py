"""A folder of slides worked through by an engine whose workers die."""

import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from utils.core.engine import WorkerDied
from utils.core.errors import SlideError
from utils.slides.batch import SlideStatus, work_through


class Mortal:
    """Two workers; those that do a slide of `deaths` die so often, the last time for good where it says so."""

    jobs, threads = 2, 1

    def __init__(self, deaths: dict[str, tuple[int, bool]]) -> None:
        self.deaths, self.order = deaths, []

    def run(self, work: Callable, tasks: list, on_message: Callable) -> None:
        for task in tasks:
            name = task[0].name
            self.order.append(name)
            deaths, for_good = self.deaths.get(name, (0, False))
            for times in range(1, deaths + 1):
                on_message(task, WorkerDied(times, for_good and times == deaths, "node7", 321))
            if not for_good:
                work(task, lambda message, task=task: on_message(task, message))


@pytest.fixture
def targets(tmp_path) -> dict[Path, Path]:
    """Slides of 10, 30 and 20 bytes."""
    for name, size in (("a.svs", 10), ("b.svs", 30), ("c.svs", 20)):
        (tmp_path / name).write_bytes(bytes(size))
    return {slide: tmp_path / "features" / f"{slide.stem}.h5" for slide in sorted(tmp_path.iterdir())}


def done(slide: Path, _: Path) -> SlideStatus:
    return SlideStatus(slide, "done", patches=3, seconds=0.5)


def test_the_largest_go_first_and_are_reported_in_their_folders_order(targets, tmp_path):
    engine = Mortal({})
    statuses = work_through(targets, engine, done, tmp_path / "features" / "report.csv")
    assert engine.order == ["b.svs", "c.svs", "a.svs"]
    assert [status.slide.name for status in statuses] == ["a.svs", "b.svs", "c.svs"]


def test_a_slide_whose_worker_dies_is_tried_again_and_then_reported(targets, tmp_path, caplog):
    report = tmp_path / "features" / "report.csv"
    statuses = work_through(targets, Mortal({"b.svs": (1, False), "c.svs": (3, True)}), done, report)
    assert [status.status for status in statuses] == ["done", "done", "failed"]
    table = pd.read_csv(report)
    assert table["tries"].tolist() == [1, 2, 3]
    assert table["node"].tolist()[2] == "node7"
    assert "c.svs: its worker process on node7 was lost (3 times now), as when memory" in table["reason"][2]
    told = [(record.levelname, record.getMessage().split(": ", 1)[0][-5:]) for record in caplog.records]
    assert told == [("WARNING", "b.svs"), *[("WARNING", "c.svs")] * 2, ("ERROR", "c.svs")]


def test_what_a_slide_took_that_fails_is_reported_too(targets, tmp_path):
    def fail(slide: Path, _: Path) -> SlideStatus:
        time.sleep(0.02)
        raise SlideError(f"{slide}: damaged")

    statuses = work_through(targets, Mortal({}), fail, tmp_path / "features" / "report.csv")
    assert {status.status for status in statuses} == {"failed"}
    assert all(status.seconds is not None and status.seconds >= 0.02 for status in statuses)


def test_what_a_dead_worker_left_half_written_is_removed(targets, tmp_path):
    """Wherever it ran; another's, and what is no part of ours, stays."""
    folder = tmp_path / "features"
    (folder / "previews").mkdir(parents=True)
    left = [folder / ".b.h5.node7-321.x1.part", folder / "previews" / ".b.jpg.node7-321.x2.part"]
    others = [folder / name for name in (".a.h5.node7-32.x.part", ".a.h5.node8-321.x.part", "b.node7-321.x.part")]
    for path in (*left, *others):
        path.touch()
    work_through(targets, Mortal({"b.svs": (1, False)}), done, folder / "report.csv")
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)
