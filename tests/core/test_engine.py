"""Work in this process and in several; what is sent to others must stand at a module's level."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from utils.core.engine import run_tasks, threads, threads_each
from utils.core.errors import EngineError, TrainingError

ROOT = Path(__file__).resolve().parents[2]


def square(task: int, tell) -> None:
    tell(("threads", torch.get_num_threads()))
    tell(("square", task * task))


def fail_at_two(task: int, tell) -> None:
    if task == 2:
        raise TrainingError("the loss is nan")
    time.sleep(0.05)
    tell(task)


def die_at_two(task: int, tell) -> None:
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)


def take_long(task: Path, tell) -> None:
    """Sign in, then outlast every patience."""
    task.write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_is_done_and_heard_in_its_order_of_telling(jobs):
    heard: dict[int, list] = {}
    with threads(1):
        run_tasks(square, [3, 4, 5], jobs, lambda task, told: heard.setdefault(task, []).append(told))
    assert heard == {task: [("threads", 1), ("square", task * task)] for task in (3, 4, 5)}


def test_no_task_starts_no_process():
    run_tasks(square, [], 4, print)


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_first_error_comes_back_as_it_was(jobs):
    with pytest.raises(TrainingError, match="the loss is nan"):
        run_tasks(fail_at_two, [1, 2, 3], jobs, lambda *_: None)
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_an_error_not_a_wait():
    with pytest.raises(EngineError, match=r"a worker process ended unexpectedly.*fewer --jobs"):
        run_tasks(die_at_two, [1, 2, 3, 4], 2, lambda *_: None)


UNGUARDED = """
from functools import partial
from utils.core.engine import refuse_rerun, run_tasks

def work(payload, task, tell):
    tell(task)

refuse_rerun()
run_tasks(partial(work, bytes(2**20)), [1, 2], 2, print)
"""


def test_a_script_without_a_guard_is_an_error_not_a_wait(tmp_path):
    """However much is sent to a process that ends before it reads."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env=os.environ | {"PYTHONPATH": str(root)}, timeout=120,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert 'each process imports the script again: let it begin with if __name__ == "__main__"' in done.stderr
    assert done.stderr.splitlines()[-1].startswith("utils.core.errors.EngineError: a worker process ended")


def test_threads_are_shared_out():
    with threads(4):
        assert [threads_each(jobs) for jobs in (1, 2, 3, 8)] == [4, 2, 1, 1]
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_when_the_first_process_ends_so_do_the_others(ending, tmp_path):
    """Ctrl-C reaches the whole group, as from a terminal; SIGKILL this one alone, and nobody can tell the others."""
    code = (
        "from pathlib import Path; from utils.core.engine import run_tasks;"
        "from tests.core.test_engine import take_long;"
        f"run_tasks(take_long, [Path({str(tmp_path)!r}, name) for name in 'ab'], 2, print)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    workers = [_signed_in(tmp_path / name, process) for name in "ab"]
    if ending == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    process.wait(20)
    deadline = time.monotonic() + 20
    while any(map(_is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if ending == signal.SIGINT:
        assert str(process.communicate()[1]).count("Traceback") == 1  # of the first process, for want of our handler


def _signed_in(path: Path, process: subprocess.Popen) -> int:
    deadline = time.monotonic() + 60
    while not (path.is_file() and path.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(path.read_text())


def _is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if sys.platform == "linux":
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return subprocess.run(["ps", "-p", str(pid)], capture_output=True, check=False).returncode == 0
