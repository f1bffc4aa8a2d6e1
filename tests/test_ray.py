"""The three commands on a Ray of this machine: the same bytes as without it, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT, SMALL_RUN, is_running

RECIPE = ("--backbone", "stain-texture", "--patch_size", 128, "--mpp", 0.5, "--no-preview")
ON_RAY = ("--ray", "local", "--actors", 2)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads worker processes from Linux's /proc")


@dataclass(frozen=True)
class Demo:
    """The folder of a demo's cohort, and flags that train on it as it was trained on."""

    folder: Path
    flags: tuple[str, ...]

    @property
    def slides(self) -> int:
        return len(list((self.folder / "wsi").iterdir()))


@pytest.fixture(params=["small", pytest.param("whole", marks=pytest.mark.slow)])
def demo(request, monkeypatch) -> Demo:
    """A demo, from within the folder it was made in."""
    monkeypatch.chdir(request.getfixturevalue(f"{request.param}_demo")[0])
    if request.param == "small":
        request.getfixturevalue("coarse_figures")  # as the demo's own
    folder = Path("datasets/demo")
    # With its table named it is a cohort like any other, whose slides are not drawn.
    small = ("--labels_csv", str(folder / "labels.csv"), *SMALL_RUN)
    return Demo(folder, small if request.param == "small" else ())


def same_features(folder: Path, expected: Path) -> bool:
    found = {path.name: path.read_bytes() for path in folder.glob("*.h5")}
    return found == {path.name: path.read_bytes() for path in expected.glob("*.h5")}


def workers(driver: int) -> set[int]:
    """The processes below the driver's that do, or wait for, what it sends them."""
    parents, found = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::Actor"):
                found.add(int(folder.name))
        except OSError:  # it has ended
            continue

    def descends(pid: int) -> bool:
        while pid in parents and pid != driver:
            pid = parents[pid]
        return pid == driver

    return set(filter(descends, found))


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def workers_killed_at(count: int, folder: Path, pattern: str) -> Iterator[None]:
    """All workers of this process, once there are so many files; one alone might still be at its beginning."""
    ended = threading.Event()

    def kill() -> None:
        wait_until(lambda: ended.is_set() or len(list(folder.glob(pattern))) >= count)
        for worker in workers(os.getpid()):
            os.kill(worker, signal.SIGKILL)

    with ThreadPoolExecutor() as pool:
        killing = pool.submit(kill)
        try:
            yield
        finally:
            ended.set()
        killing.result()


CHECKPOINT = "outputs/LiteMIL/demo/all_folds_best.pth"


def extraction(demo: Demo, target: Path, *flags: object) -> tuple[object, ...]:
    return "--input_dir", demo.folder / "wsi", "--output_dir", target, *RECIPE, *ON_RAY, *flags


def test_extraction_gives_the_same_bytes_though_its_workers_die(ray, demo, script, tmp_path):
    target = tmp_path / "features"

    with workers_killed_at(3, target, "*.h5"):
        outcome = script("extractFeatures", *extraction(demo, target))
    assert outcome.code == 0, outcome.err
    assert "0 failed" in outcome.out
    assert "raylet" not in outcome.out + outcome.err
    assert "was lost, as when memory runs out or a node goes down; trying it again" in outcome.err
    assert same_features(target, demo.folder / "features")
    report = pd.read_csv(target / "extraction_report.csv")
    assert set(report["status"]) <= {"done", "skipped"}  # skipped: it died between writing and telling
    assert set(report["tries"]) == {1, 2}
    assert set(report["node"]) == {os.uname().nodename}
    assert not list(target.rglob("*.part"))
    assert (report.loc[report["status"] == "done", "seconds"] > 0).all()


@pytest.mark.slow
def test_extraction_goes_on_after_its_driver_was_ended(ray, demo, script, tmp_path):
    """As a batch system asks it to, then without asking."""
    target = tmp_path / "features"
    arguments = extraction(demo, target)
    command = [sys.executable, str(ROOT / "extractFeatures.py"), *map(str, arguments)]
    for more_than, ending, code in ((1, signal.SIGTERM, 143), (demo.slides // 2, signal.SIGKILL, -9)):
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_until(lambda more_than=more_than: len(list(target.glob("*.h5"))) > more_than)
        theirs = workers(driver.pid)
        assert theirs
        driver.send_signal(ending)
        said = driver.communicate()[1]
        assert driver.returncode == code, said
        assert "***" not in said  # a page of Ray's on the signal
        wait_until(lambda theirs=theirs: not any(map(is_running, theirs)))
        assert more_than < len(list(target.glob("*.h5"))) < demo.slides
    outcome = script("extractFeatures", *arguments)
    assert outcome.code == 0, outcome.err
    assert "0 failed" in outcome.out
    assert same_features(target, demo.folder / "features")
    assert not list(target.rglob("*.part"))


@pytest.mark.parametrize("driver_dies", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_gives_the_same_files_though_processes_die(ray, demo, script, tmp_path, driver_dies):
    """Its workers, or first its driver and then its workers."""
    run, expected = tmp_path / "run", Path("outputs/LiteMIL/demo")
    arguments = ("--mil", "LiteMIL", "--dataset", "demo", "--output_dir", run, *demo.flags, *ON_RAY)
    kept = trained_until_the_driver_was_killed(arguments, run) if driver_dies else 0
    trainings = len(pd.read_csv(expected / "history.csv")[["fold", "inner"]].drop_duplicates())
    assert kept < trainings - 2
    with workers_killed_at(kept + 2, run / "resume", "fold_*.pt"):
        outcome = script("train", *arguments)
    assert outcome.code == 0, outcome.err
    assert "was lost, as when memory runs out or a node goes down; it is trained again" in outcome.err
    assert {path.name for path in run.rglob("*")} == {path.name for path in expected.rglob("*")}
    for path in expected.iterdir():
        if path.name != "run.json":  # of times and machines
            assert (run / path.name).read_bytes() == path.read_bytes(), path.name
    record = json.loads((run / "run.json").read_text())
    assert record["jobs"] == 2
    assert record["peak_memory"] is None  # of machines that this one does not see


def trained_until_the_driver_was_killed(arguments: tuple[object, ...], run: Path) -> int:
    """How many trainings had ended by then."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list((run / "resume").glob("fold_*.pt"))) > 1)
    theirs = workers(driver.pid)
    assert theirs
    driver.kill()
    driver.wait()
    wait_until(lambda: not any(map(is_running, theirs)))
    return len(list((run / "resume").glob("fold_*.pt")))


@pytest.mark.parametrize(
    ("flags", "slides"),
    [
        (("--checkpoint", CHECKPOINT, "--input_dir", "datasets/demo/holdout/wsi", "--labels_csv",
          "datasets/demo/holdout/labels.csv"), "holdout/wsi"),
        (("--out_of_fold", "outputs/LiteMIL/demo"), "wsi"),
    ],
)  # fmt: skip
def test_prediction_gives_the_same_files(ray, demo, script, tmp_path, flags, slides):
    folders = []
    for name, engine in (("alone", ()), ("ray", ON_RAY)):
        folders.append(tmp_path / name)
        outcome = script("predict", *flags, "--output_dir", folders[-1], *engine)
        assert outcome.code == 0, outcome.err
        assert f"{len(list((demo.folder / slides).iterdir()))} done" in outcome.out
    alone, on_ray = ({path.relative_to(one) for path in one.rglob("*")} for one in folders)
    assert alone == on_ray
    for name in sorted(alone):
        if name.suffix in (".json", ".csv") and name.name != "prediction_report.csv":
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_contradicting_flags_are_refused_before_any_work(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = script("train", "--mil", "LiteMIL", "--dataset", "demo", "--jobs", 2, "--ray", "local")
    assert outcome.code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("extractFeatures", ("--input", "a.svs"), "--ray distributes the slides of a folder; give --input_dir"),
        (
            "predict",
            ("--checkpoint", CHECKPOINT, "--input", "datasets/demo/wsi/synthetic-01-1.tif"),
            "--ray distributes the slides of a folder; give --input_dir",
        ),
        ("train", ("--mil", "LiteMIL", "--dataset", "demo", "--jobs", "2"), "--jobs 2: is for one machine"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it(name, flags, message, demo, script, tmp_path):
    Path("a.svs").touch()
    outcome = script(name, *flags, "--ray", "local")
    assert outcome.code == 1
    assert message in outcome.errors[0]
