"""Work in this process and in several."""

import dataclasses
import importlib.util
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from tests.conftest import is_running
from tests.core import torch_work, work
from utils.core.engine import (
    Processes,
    Threads,
    WorkerDied,
    check_engine,
    open_engine,
    threads,
    threads_each,
    worker_number,
)
from utils.core.errors import ConfigError, EngineError, TrainingError
from utils.core.processes import is_out_of_memory
from utils.core.ray_settings import Cluster
from utils.core.runtime import log, processors

ROOT = Path(__file__).resolve().parents[2]
HERE = platform.node()


@pytest.fixture(params=["here", "threads", "processes", "ray"])
def engine(request):
    found = {"here": Processes(), "threads": Threads(2), "processes": Processes(2)}.get(request.param)
    with threads(1):
        yield request.getfixturevalue("ray") if found is None else found


def test_every_task_is_done_and_heard_in_its_order_of_telling(engine):
    heard: dict[int, list] = {}
    engine.run(torch_work.square, [3, 4, 5], lambda task, message: heard.setdefault(task, []).append(message))
    assert heard == {task: [("threads", 1), ("square", task * task)] for task in (3, 4, 5)}


def test_no_task_begins_nothing(engine):
    engine.run(torch_work.square, [], print)


def test_the_first_error_comes_back_as_it_was(engine):
    with pytest.raises(TrainingError, match="the loss is nan"):
        engine.run(work.fail_at_two, [1, 2, 3], lambda *_: None)
    assert not multiprocessing.active_children()


def test_what_workers_log_is_logged_here(engine, caplog):
    if isinstance(engine, Processes) and engine.jobs > 1:
        pytest.skip("processes of this machine log to its stderr themselves")
    with caplog.at_level("WARNING"):
        engine.run(work.warn, [7], lambda *_: None)
    there = 1 if type(engine).__name__ == "OnRay" else processors()  # its share of the machine
    assert [record.getMessage() for record in caplog.records] == [f"task 7 on {there}"]


def test_threads_have_numbers_of_their_own():
    heard = []
    barrier = threading.Barrier(2)

    def meet(_: int, send) -> None:
        barrier.wait(10)
        send(worker_number())

    Threads(2).run(meet, [1, 2], lambda _, message: heard.append(message))
    assert sorted(heard) == [0, 1]
    assert worker_number() == 0


def test_an_error_stops_the_other_threads():
    stop = threading.Event()
    with pytest.raises(TrainingError):
        Threads(2, stop).run(work.fail_at_two, [2, *range(3, 100)], lambda *_: None)
    assert stop.is_set()


@pytest.mark.parametrize(
    ("work_once_lost", "message", "heard_of_it"),
    [
        (work.outlive, "its worker process was killed (signal 9), as when memory runs out", ["begun", "half", "ended"]),
        (work.run_out_of_memory, "its worker process ran out of memory", ["ended"]),
    ],
)
def test_a_task_whose_process_is_lost_is_done_by_the_other(work_once_lost, message, heard_of_it, tmp_path):
    heard: dict[int, list] = {1: [], 2: []}
    tasks = [(number, tmp_path) for number in heard]
    Processes(2).run(work_once_lost, tasks, lambda task, message: heard[task[0]].append(message))
    assert not multiprocessing.active_children()
    assert heard[1] == heard_of_it
    (lost,) = [message for message in heard[2] if isinstance(message, WorkerDied)]
    assert (str(lost), lost.for_good, lost.workers_left) == (message, False, 1)
    assert heard[2][heard[2].index(lost) + 1 :] == heard_of_it


@pytest.mark.slow
def test_a_task_whose_process_dies_is_tried_again_with_fewer_at_a_time(tmp_path):
    """Two kills its first process, three each of them; all others are done, and none of them twice."""
    heard: dict[int, list] = {number: [] for number in range(1, 6)}
    tasks = [(number, tmp_path) for number in heard]
    Processes(2).run(work.outlive, tasks, lambda task, message: heard[task[0]].append(message))
    assert not multiprocessing.active_children()
    losses = {number: [message for message in heard[number] if isinstance(message, WorkerDied)] for number in heard}
    assert {number: len(lost) for number, lost in losses.items()} == {1: 0, 2: 1, 3: 2, 4: 0, 5: 0}
    assert [lost.for_good for lost in losses[3]] == [False, True]
    assert [message for message in heard[2] if message not in losses[2]] == ["begun", "half", "begun", "half", "ended"]
    assert all(heard[number] == ["begun", "half", "ended"] for number in (1, 4, 5))
    assert {lost.workers_left for number in (2, 3) for lost in losses[number] if not lost.for_good} == {1}
    assert str(losses[2][0]) == "its worker process was killed (signal 9), as when memory runs out"
    assert str(losses[3][1]).endswith("as when memory runs out (2 times now)")


@pytest.mark.slow
def test_a_task_whose_process_runs_out_of_memory_is_tried_again_with_fewer_at_a_time(tmp_path):
    heard: dict[int, list] = {number: [] for number in range(1, 6)}
    tasks = [(number, tmp_path) for number in heard]
    Processes(2).run(work.run_out_of_memory, tasks, lambda task, message: heard[task[0]].append(message))
    assert not multiprocessing.active_children()
    assert heard[1] == heard[4] == heard[5] == ["ended"]
    lost, ended = heard[2]
    assert (str(lost), lost.for_good, ended) == ("its worker process ran out of memory", False, "ended")
    assert [lost.for_good for lost in heard[3]] == [False, True]
    assert str(heard[3][1]) == "its worker process ran out of memory (2 times now)"


def test_memory_that_runs_out_in_this_process_ends_it_without_a_traceback(tmp_path):
    heard = []
    Processes().run(
        work.run_out_of_memory, [(1, tmp_path), (3, tmp_path), (4, tmp_path)], lambda _, message: heard.append(message)
    )
    assert [str(message) for message in heard] == ["ended", "it ran out of memory"]
    assert heard[1].for_good


@pytest.mark.parametrize(
    ("failure", "is_so"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_whether_memory_ran_out(failure, is_so):
    assert is_out_of_memory(failure) is is_so


def test_processes_that_all_die_are_not_begun_again_and_again():
    heard = []
    Processes(2).run(work.die, [1, 2, 3, 4, 5], lambda task, message: heard.append(message))
    assert [lost.for_good for lost in heard] in ([False, True], [False, False, True])
    assert "ended unexpectedly (exit code 7)" in str(heard[0])


def without_process(message):
    """Which ran in between is another each time."""
    return (
        dataclasses.replace(message, process=0) if isinstance(message, WorkerDied) and message.process > 0 else message
    )


class TestRay:
    def test_a_task_whose_worker_dies_is_done_by_another_so_often_and_the_others_go_on(self, ray, tmp_path):
        """What is told last is heard with the end, so that nothing is both ended and lost."""
        heard: dict[int, list] = {number: [] for number in range(1, 5)}
        tasks = [(number, tmp_path) for number in heard]
        ray.run(work.outlive, tasks, lambda task, message: heard[task[0]].append(without_process(message)))
        assert heard.pop(2) == ["begun", WorkerDied(1, False, HERE, 0), "begun", "half", "ended"]
        assert heard.pop(3) == [
            *("begun", WorkerDied(1, False, HERE, 0), "begun", WorkerDied(2, False, HERE, 0), "begun"),
            WorkerDied(3, True, HERE, 0),
        ]
        assert heard == {number: ["begun", "half", "ended"] for number in (1, 4)}

    def test_a_bug_comes_back_with_its_traceback(self, ray):
        with pytest.raises(ZeroDivisionError) as error:
            ray.run(work.divide, [0], lambda *_: None)
        assert "in divide" in "".join(error.value.__notes__)

    def test_an_error_that_cannot_be_sent_comes_as_its_text(self, ray):
        """It is pickled, and unpickled with one argument too few."""
        with pytest.raises(RuntimeError, match="TwoPartError: a and b") as error:
            ray.run(work.fail_oddly, [0], lambda *_: None)
        assert "in fail_oddly" in "".join(error.value.__notes__)

    def test_what_cannot_be_sent_is_nobodys_death(self, ray):
        heard = []
        with pytest.raises(Exception, match="missing 1 required positional argument: 'second'"):
            ray.run(work.send_oddly, [0], lambda _, message: heard.append(message))
        assert not heard

    def test_more_threads_than_any_node_has_processors_are_given_all_the_same(self, ray):
        """As a run goes on that was begun on a larger machine."""
        heard = []
        with threads(processors() + 1):
            ray.run(torch_work.square, [2], lambda _, message: heard.append(message))
        assert heard == [("threads", processors() + 1), ("square", 4)]

    def test_workers_that_die_at_their_beginning_are_replaced_so_often(self, ray, caplog):
        with pytest.raises(EngineError, match=r"workers ended before their first task, 3 in a row.*fewer --actors"):
            ray.run(work.Unpacked(os._exit, 1), [0], lambda *_: None)
        assert [message.split(" (")[1] for message in caplog.messages] == ["1 in a row)", "2 in a row)"]

    @pytest.mark.slow
    def test_a_task_that_may_not_have_begun_is_tried_once_more(self, ray, tmp_path):
        """A worker may die between two tasks, when the next is on its way already."""
        heard: dict[int, list] = {}
        tasks = [work.Deadly(tmp_path / str(deaths), deaths) for deaths in (1, 2)]
        once = dataclasses.replace(ray, retries=0)
        once.run(work.send_name, tasks, lambda task, message: heard.setdefault(task.deaths, []).append(message))
        lost = {deaths: [(message.times, message.for_good) for message in messages if isinstance(message, WorkerDied)]
                for deaths, messages in heard.items()}  # fmt: skip
        assert lost == {1: [(1, False)], 2: [(1, False), (2, True)]}
        assert heard[1][-1] == "1"

    def test_workers_without_a_share_of_a_gpu_see_none(self, ray):
        heard = []
        ray.run(work.send_environment, ["CUDA_VISIBLE_DEVICES"], lambda _, message: heard.append(message))
        assert heard == [""]

    @pytest.mark.slow
    def test_deaths_at_the_beginning_count_in_a_row(self, ray, tmp_path):
        """One, then a worker that begins and dies of its task, then two more, then one that does it."""
        heard = []
        ray.run(work.Unpacked(work.begun_by_two_of_five, tmp_path), [0], lambda _, message: heard.append(message))
        assert list(map(without_process, heard)) == [WorkerDied(1, False, HERE, 0), "done by 4"]

    @pytest.mark.slow
    def test_workers_that_cannot_begin_do_not_end_those_that_work(self, ray, tmp_path, caplog):
        """As on a node without room in its memory."""
        heard, warnings = [], logging.Handler()
        warnings.emit = lambda record: (tmp_path / f"warning_{record.created}").touch()
        log.addHandler(warnings)
        ray.run(work.Unpacked(work.begun_by_the_first, tmp_path), [1, 2], lambda _, message: heard.append(message))
        assert heard == ["done", "done"]
        assert [message.split(" (")[1] for message in caplog.messages] == [
            "1 in a row)",
            "2 in a row)",
            "3 in a row, so it is not replaced)",
        ]
        assert all(f"a worker process on {HERE} ended before it had begun" in message for message in caplog.messages)

    def test_a_worker_that_lacks_something_says_so_in_one_line(self, ray):
        with pytest.raises(EngineError, match=rf"^--ray: a worker cannot begin on {HERE}: --weights x: no such file$"):
            ray.run(work.Unpacked(work.ask, "--weights x: no such file"), [0], lambda *_: None)

    def test_a_bug_at_the_beginning_comes_back_with_its_traceback(self, ray):
        with pytest.raises(ValueError, match="invalid literal") as error:
            ray.run(work.Unpacked(int, "nonsense"), [0], lambda *_: None)
        assert f"on {HERE}:\nTraceback" in "".join(error.value.__notes__)

    def test_workers_have_the_drivers_word_on_downloads(self, ray, monkeypatch):
        monkeypatch.setenv("HF_HOME", "/weights/of/ours")
        heard = []
        ray.run(work.send_environment, ["HF_HOME"], lambda _, message: heard.append(message))
        assert heard == ["/weights/of/ours"]

    def test_a_node_without_what_is_needed_is_named(self, ray):
        with pytest.raises(
            EngineError, match=rf"cannot begin \(on {HERE}: No module named 'nonsense'\); all nodes need"
        ):
            ray.run(work.Unpacked(importlib.import_module, "nonsense"), [0], lambda *_: None)

    def test_what_all_workers_say_is_said_once_but_not_a_warning(self, ray, caplog):
        with caplog.at_level("INFO", log.name):
            ray.run(work.greet, [1, 2, 3], lambda *_: None)
        assert sorted(caplog.messages) == ["careful", "careful", "careful", "hello"]

    def test_workers_begin_where_the_driver_is(self, ray, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        heard = []
        ray.run(work.where, [1], lambda _, message: heard.append(message))
        assert heard == [tmp_path]

    def test_what_is_asked_for_in_vain_is_told(self, monkeypatch):
        with pytest.raises(ConfigError, match=r"--jobs 2: is for one machine; with --ray give --actors"):
            open_engine(Cluster(ray="local"), Processes(2)).__enter__()
        with pytest.raises(ConfigError, match="--actors 2: goes with --ray"):
            Cluster(actors=2)
        with pytest.raises(ConfigError, match="--retries 0: goes with --ray"):
            Cluster(retries=0)
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(EngineError, match=r"--ray auto: Ray cannot be imported.*uv sync --extra ray"):
            open_engine(Cluster(ray="auto"), Processes()).__enter__()
        monkeypatch.delitem(sys.modules, "ray")
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(EngineError, match="--ray auto: Ray is not installed; install it with uv sync --extra ray"):
            check_engine(Cluster(ray="auto"))

    @pytest.mark.parametrize(
        "address", ["", "nonsense", "LOCAL", "head:x", "head:99999", "ray://head:10001", "head:1/a"]
    )
    def test_no_address(self, address):
        with pytest.raises(ConfigError, match=f"--ray {address}: neither local nor auto; .* give HOST:PORT"):
            Cluster(ray=address)

    def test_no_cluster_there(self, monkeypatch):
        self.no_ray(monkeypatch, AssertionError("not asked"))
        with pytest.raises(EngineError, match=r"--ray 127.0.0.1:1: no Ray cluster can be joined.*refused.*start"):
            open_engine(Cluster(ray="127.0.0.1:1"), Processes()).__enter__()

    def test_a_start_that_takes_too_long(self, monkeypatch):
        self.no_ray(monkeypatch, Exception("The current node timed out during startup"))
        with pytest.raises(EngineError, match=r"--ray local: Ray cannot be started on this machine .*timed out.*alone"):
            open_engine(Cluster(ray="local"), Processes()).__enter__()

    def test_more_workers_than_there_is_room_for(self, monkeypatch, caplog):
        self.cluster_of([{"CPU": 2}, {"CPU": 3}], monkeypatch)
        with threads(1), open_engine(Cluster(ray="auto", actors=9), Processes()):
            assert "the cluster has processors for 5 of 9 workers" in caplog.messages

    @pytest.mark.parametrize(
        ("actors", "device", "jobs", "threads_each", "share"),
        [
            (None, "auto", 3, 2, 1),  # a GPU each
            (3, "auto", 3, 2, 1),
            (4, "auto", 4, 2, 1 / 2),  # three GPUs: two of them for two each, as Ray fills them
            (7, "cuda", 7, 1, 1 / 3),
            (None, "cpu", 4, 2, 0),  # the threads of this process each
            (100, "cpu", 100, 1, 0),
        ],
    )
    def test_workers_share_the_processors_and_the_gpus_out(
        self, actors, device, jobs, threads_each, share, monkeypatch
    ):
        self.cluster_of([{"CPU": 2, "GPU": 1}, {"CPU": 6, "GPU": 2}], monkeypatch)
        with threads(2), open_engine(Cluster(ray="auto", actors=actors), Processes(), device) as engine:
            assert (engine.jobs, engine.threads, vars(engine)["gpus"]) == (jobs, threads_each, share)

    @pytest.mark.parametrize(
        ("actors", "device", "each"),
        [(1, "cpu", "1 actor of 2 threads"), (2, "auto", "2 actors of 2 threads and a GPU"),
         (5, "cuda", "5 actors of 1 thread and 1/3 of a GPU")],
    )  # fmt: skip
    def test_what_is_taken_is_said_beside_what_there_is(self, actors, device, each, monkeypatch, caplog):
        self.cluster_of([{"CPU": 8, "GPU": 2}], monkeypatch)
        with (
            caplog.at_level("INFO", log.name),
            threads(2),
            open_engine(Cluster(ray="auto", actors=actors), Processes(), device),
        ):
            assert caplog.messages == [f"Ray auto: {each} each, on 1 node with 8 processors and 2 GPUs"]

    @pytest.mark.parametrize(("actors", "idle"), [(2, False), (3, False), (4, True), (5, False), (9, False)])
    def test_gpus_that_stay_idle_are_told(self, actors, idle, monkeypatch, caplog):
        """Ray gives a GPU all its shares away before it takes the next."""
        self.cluster_of([{"CPU": 16, "GPU": 3}], monkeypatch)
        with threads(1), open_engine(Cluster(ray="auto", actors=actors), Processes()):
            told = "4 workers share the GPUs by 2, which leaves some of the 3 idle; give --actors 6"
            assert caplog.messages == ([told] if idle else [])

    @pytest.mark.parametrize(
        ("nodes", "own", "device", "jobs", "threads_each"),
        [
            ([{"CPU": 2}, {"CPU": 3}], 4, "auto", 1, 3),
            ([{"CPU": 8}, {"CPU": 8}], 6, "cpu", 2, 6),
            ([{"CPU": 16}, {"CPU": 40}], 12, "cpu", 4, 12),
            ([{"CPU": 64}, {"CPU": 32, "GPU": 4}, {"CPU": 32, "GPU": 4}], 32, "auto", 8, 8),
            ([{"CPU": 16, "GPU": 1}, {"CPU": 64, "GPU": 1}], 32, "auto", 2, 16),
            ([{"CPU": 8}, {"CPU": 2, "GPU": 2}], 8, "cuda", 2, 1),
            ([{"GPU": 1}, {"CPU": 4, "GPU": 1}], 2, "auto", 1, 2),  # the first has no processor for its GPU
        ],
    )
    def test_all_workers_find_a_node_with_room_for_them(self, nodes, own, device, jobs, threads_each, monkeypatch):
        self.cluster_of(nodes, monkeypatch)
        with threads(own), open_engine(Cluster(ray="auto"), Processes(), device) as engine:
            assert (engine.jobs, engine.threads) == (jobs, threads_each)

    def test_no_node_has_room(self, monkeypatch):
        self.cluster_of([{"CPU": 0}, {}], monkeypatch)
        with pytest.raises(EngineError, match=r"--ray auto: no node has what a worker needs; give its processors to"):
            open_engine(Cluster(ray="auto"), Processes(), "cpu").__enter__()

    def test_a_device_of_one_machine_is_nobodys_on_several(self):
        with pytest.raises(ConfigError, match=r"--device cuda:1: names devices of one machine; .* auto, cpu or cuda"):
            open_engine(Cluster(ray="auto"), Processes(), "cuda:1").__enter__()

    def test_gpus_that_are_asked_for_and_not_there(self, monkeypatch):
        self.cluster_of([{"CPU": 2}], monkeypatch)
        with pytest.raises(EngineError, match=r"--ray auto: the cluster has no GPU; give --device cpu"):
            open_engine(Cluster(ray="auto"), Processes(), "cuda").__enter__()

    def cluster_of(self, nodes: list[dict[str, int]], monkeypatch) -> None:
        """A ray module that tells of it; a dead node beside them does not count."""
        ray = types.SimpleNamespace(
            is_initialized=lambda: True,
            nodes=lambda: [
                *({"Alive": True, "Resources": node} for node in nodes),
                {"Alive": False, "Resources": {"CPU": 64}},
            ],
        )
        monkeypatch.setitem(sys.modules, "ray", ray)

    def test_none_can_be_started_here(self, monkeypatch):
        self.no_ray(monkeypatch, OSError("no space left"))
        with pytest.raises(EngineError, match=r"--ray local: Ray cannot be started on this machine \(no space left\)"):
            open_engine(Cluster(ray="local"), Processes()).__enter__()

    def test_a_cluster_asks_for_what_is_not_given(self, monkeypatch):
        self.no_ray(monkeypatch, OddError("Token required,\nbut none was found"))
        with pytest.raises(
            EngineError, match=r"no Ray .* there \(Token required, but none was found\); .*RAY_AUTH_MODE"
        ):
            open_engine(Cluster(ray="auto"), Processes()).__enter__()

    def no_ray(self, monkeypatch, reason: Exception) -> None:
        """A ray module that cannot be started."""

        def init(**_: object) -> None:
            raise reason

        kinds = types.SimpleNamespace(RayError=OddError)
        ray = types.SimpleNamespace(is_initialized=lambda: False, init=init, exceptions=kinds)
        monkeypatch.setitem(sys.modules, "ray", ray)

    def test_without_the_flag_it_is_not_imported(self):
        code = (
            "import sys; from utils.core.ray_settings import Cluster\n"
            "from utils.core.engine import Processes, open_engine\n"
            "import train, predict, extractFeatures\n"
            "with open_engine(Cluster(), Processes()): assert 'ray' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class OddError(Exception):
    """As Ray's own errors, none that Python has."""


UNGUARDED = """
from functools import partial
from utils.core.engine import Processes, refuse_rerun

def work(payload, task, send):
    send(task)

refuse_rerun()
Processes(2).run(partial(work, bytes(2**20)), [1, 2], print)
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
        "from pathlib import Path; from utils.core.engine import Processes;"
        "from tests.core.work import take_long;"
        f"Processes(2).run(take_long, [Path({str(tmp_path)!r}, name) for name in 'ab'], print)"
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
    while any(map(is_running, workers)):
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
