"""Devices, seeds, versions, memory and progress bars."""

import multiprocessing
import os
import platform
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from utils.core import runtime
from utils.core.device import resolve_device, run_metadata, seed_everything
from utils.core.errors import ConfigError
from utils.core.runtime import (
    available_memory,
    derive_seed,
    duration,
    prefetch,
    progress,
    progress_bar,
    version_of,
    versions,
)


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    "name", ["", "gpu", "CUDA", "cpu:0", "cuda:", "cuda:-1", "cuda:01", "cuda:0 ", "meta", "mps:0"]
)
def test_an_unknown_device_is_told(name, one_gpu):
    with pytest.raises(ConfigError, match=f"^--device {name}: unknown; use auto"):
        resolve_device(name)


def test_a_device_that_is_not_there_is_told(no_gpu):
    for name in ("cuda", "cuda:0", "cuda:3"):
        with pytest.raises(ConfigError, match=f"--device {name}: PyTorch sees 0 CUDA devices"):
            resolve_device(name)
    with pytest.raises(ConfigError, match="--device mps: PyTorch sees no Apple GPU"):
        resolve_device("mps")
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto") == torch.device("cpu")


def test_a_second_gpu_that_is_not_there_is_told(one_gpu):
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    assert resolve_device("auto") == torch.device("cuda")
    for name in ("cuda:1", "cuda:300"):
        with pytest.raises(ConfigError, match=f"--device {name}: PyTorch sees 1 CUDA devices"):
            resolve_device(name)


def test_auto_prefers_cuda_then_mps(monkeypatch, no_gpu):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


def test_derived_seeds_are_the_same_everywhere():
    """Results of a year ago can be made again only while these values stand."""
    assert derive_seed(42, "outer") == 49655537062187160
    assert derive_seed(42, "inner", 1) == 5295651693525315


def test_derived_seeds_differ_and_fit_every_generator():
    parts = [(seed, fold, epoch) for seed in range(5) for fold in range(12) for epoch in range(12)]
    parts += [(), (1,), (12,), (1, 23), (12, 3), (123,), ("a",), ("a", "b"), ("ab",), ("b", "a")]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    for seed in (min(seeds), max(seeds)):
        assert 0 <= seed < 2**63
        seed_everything(seed)
        np.random.default_rng(seed)
        torch.Generator().manual_seed(seed)


def test_seed_everything_seeds_the_three_generators():
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002, S311

    seed_everything(7)
    first = draw()
    assert draw() != first
    seed_everything(7)
    assert draw() == first
    seed_everything(8)
    assert all(one != other for one, other in zip(draw(), first, strict=True))


def test_versions_are_those_of_the_packages():
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["litemil"] != "not installed"


def test_a_package_that_is_absent_is_said_to_be():
    assert version_of("no-such-package") == "not installed"


def test_run_metadata_says_what_ran_and_where():
    found = run_metadata(torch.device("cpu"))
    assert found["argv"] == sys.argv
    assert found["device"] == "cpu"
    assert found["gpu"] is None
    assert found["threads"] == torch.get_num_threads()
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert found["git_commit"] == (answer.stdout.strip() or None)


def test_available_memory_is_that_of_the_system():
    free = available_memory()
    assert free is not None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        total = int(meminfo.read_text().split("MemTotal:")[1].split()[0]) * 1024
        assert 0 <= free <= total


def write_group(folder: Path, bound: str, held: int, cached: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (bound, held), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 9\n")


def test_the_limits_of_a_batch_job_are_found(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    mount = tmp_path / "sys/fs/cgroup"
    write_group(mount / "slurm/job_7/step_0", "max", 10, 0)
    write_group(mount / "slurm/job_7", "1000", 700, 100)
    write_group(mount / "slurm", "5000", 700, 100)
    assert runtime.free_within_limits(tmp_path) == [400, 4400]


def test_the_limits_of_a_container_are_found(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:cpu:/x\n4:memory:/docker/abc\n0::/\n")
    write_group(tmp_path / "sys/fs/cgroup/memory/docker/abc", "1000", 1200, 0, version=1)
    assert runtime.free_within_limits(tmp_path) == [0], "never less than nothing"


def test_a_system_without_limits_has_none(tmp_path):
    assert runtime.free_within_limits(tmp_path) == []


def test_the_tightest_bound_counts(monkeypatch):
    monkeypatch.setattr(runtime, "system_memory", lambda: 1000)
    monkeypatch.setattr(runtime, "free_within_limits", lambda: [2000, 300])
    assert available_memory() == 300
    monkeypatch.setattr(runtime, "free_within_limits", lambda: [2000])
    assert available_memory() == 1000
    monkeypatch.setattr(runtime, "system_memory", lambda: None)
    assert available_memory() is None


def write_quota(group: Path, **files: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (group / name.replace("__", ".")).write_text(content + "\n")


def test_a_containers_share_of_the_processors_is_found(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/kubepods/pod_1/box\n")
    mount = tmp_path / "sys/fs/cgroup"
    write_quota(mount / "kubepods/pod_1/box", cpu__max="250000 100000")
    write_quota(mount / "kubepods/pod_1", cpu__max="max 100000")
    write_quota(mount / "kubepods", cpu__max="600000 50000")
    assert runtime.shares_of_processors(tmp_path) == [2.5, 12]


@pytest.mark.parametrize("line", ["5:cpu,cpuacct:/docker/abc", "5:cpu:/docker/abc", "5:cpuacct,cpu:/docker/abc"])
def test_a_share_is_found_in_the_first_version_of_cgroups_too(tmp_path, line):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpuset:/other\n{line}\n0::/\n")
    mount = tmp_path / "sys/fs/cgroup/cpu"
    write_quota(mount / "docker/abc", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    write_quota(mount, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert runtime.shares_of_processors(tmp_path) == [1.5]


def test_no_more_processors_are_used_than_the_share_fills(monkeypatch):
    monkeypatch.setattr(runtime, "visible_processors", lambda: 64)
    for shares, count in (([], 64), ([2.5, 12.0], 2), ([0.5], 1), ([100.0], 64)):
        monkeypatch.setattr(runtime, "shares_of_processors", lambda shares=shares: shares)
        assert runtime.processors() == count
    try:
        runtime.share_processors(3)
        assert runtime.processors() == 3
    finally:
        runtime.share_processors(None)
    assert runtime.processors() == 64


@pytest.fixture
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """The environment of a user who has said nothing about threads, and put back afterwards."""
    for name in (*runtime.WAITING, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return monkeypatch


def test_threads_wait_asleep_unless_the_user_says_otherwise(environment):
    assert not runtime.threads_wait_asleep()
    runtime.prepare_threads()
    assert runtime.threads_wait_asleep()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["KMP_BLOCKTIME"]) == ("PASSIVE", "0")


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "9"), ("KMP_BLOCKTIME", "1")]
)
def test_how_the_user_lets_threads_wait_stays(environment, name, value):
    environment.setenv(name, value)
    runtime.prepare_threads()
    assert {one: os.environ[one] for one in runtime.WAITING if one in os.environ} == {name: value}
    assert not runtime.threads_wait_asleep()


def test_a_container_gets_as_many_threads_as_its_share_fills(environment):
    environment.setattr(runtime, "visible_processors", lambda: 64)
    environment.setattr(runtime, "shares_of_processors", lambda: [4.0])
    runtime.prepare_threads()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert not runtime.threads_are_given(), "that is ours"
    environment.setenv("OMP_NUM_THREADS", "7")
    runtime.prepare_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert runtime.threads_are_given()


FAULTS = """
import resource
from utils.core import cli
from utils.core.runtime import keep_freed_memory

def faults():
    import torch
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def main():
    faults()
    keep_freed_memory()
    faults()
    print(faults())

cli.run(main)
"""


@pytest.fixture(scope="module")
def answer() -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which it changes for good: its page faults, and OpenMP's settings."""
    clean = {name: value for name, value in os.environ.items() if name not in runtime.WAITING}
    return subprocess.run(
        [sys.executable, "-c", FAULTS], env=clean | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True,
        check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU's OpenMP, which PyTorch brings on Linux")
def test_pytorchs_openmp_takes_it_over(answer):
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in answer.stderr
    assert "GOMP_SPINCOUNT = '0'" in answer.stderr


def test_a_log_is_not_flooded_by_a_progress_bar(capsys):
    assert list(progress(range(5000), "Reading", unit="slide")) == list(range(5000))
    error = capsys.readouterr().err
    assert "Reading" in error
    assert "5000/5000" in error
    assert error.count("\r") <= 3
    with progress_bar("Reading", 5000) as bar:
        for _ in range(5000):
            bar.update()
    assert capsys.readouterr().err.count("\r") <= 3


def test_items_are_made_one_ahead_and_in_their_order():
    made, main = [], threading.get_ident()

    def items():
        for number in range(5):
            made.append((number, threading.get_ident()))
            yield number

    started = prefetch(items())
    assert next(started) == 0
    for _ in range(1000):  # the next one is made meanwhile
        if len(made) == 2:
            break
        time.sleep(0.01)
    assert [number for number, _ in made] == [0, 1]
    assert list(started) == [1, 2, 3, 4]
    assert main not in {thread for _, thread in made}
    assert list(prefetch([])) == []


def test_what_fails_while_it_is_made_ahead_fails_where_it_is_asked_for():
    def items():
        yield 1
        raise ConfigError("no second one")

    started = prefetch(items())
    assert next(started) == 1
    with pytest.raises(ConfigError, match="no second one"):
        next(started)


def test_what_is_made_ahead_may_be_left_alone():
    started = prefetch(iter(range(10**9)))
    next(started)
    started.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_keeping_freed_memory_spares_page_faults(answer):
    """Tensors made again and again touch new pages only once."""
    assert int(answer.stdout) < 1024  # 1024 pages a tensor, 20 tensors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_child_leaves_the_bars_of_its_parent_free():
    """By itself tqdm shares a lock with forked processes, which stays taken when one is killed while it holds it."""

    def hold() -> None:
        with tqdm.get_lock():
            time.sleep(30)

    child = multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    time.sleep(0.3)
    child.kill()
    child.join()
    assert tqdm.get_lock().acquire(timeout=5)
    tqdm.get_lock().release()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.6, "1 second"), (2.2, "2 seconds"), (89, "89 seconds"), (90, "1.5 minutes")]
)
def test_a_duration_in_words(seconds, words):
    assert duration(seconds) == words
