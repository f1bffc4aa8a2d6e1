"""How a process runs: its share of the machine, threads, log lines, progress bars, versions. Imports nothing slow."""

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("litemil")
Item = TypeVar("Item")

_RECORDED_PACKAGES = ("torch", "numpy", "timm", "h5py", "openslide-python", "openslide-bin", "scikit-learn")
# The memory limits of cgroups, version 2 and version 1: line of /proc/self/cgroup, mount, and files of limit and usage.
_MEMORY_LIMITS = (
    (r"^0::(/.*)$", "sys/fs/cgroup", "memory.max", "memory.current"),
    (r"^\d+:memory:(/.*)$", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Their processor limits: line, mount, and files of quota and period in microseconds.
_PROCESSOR_LIMITS = (
    (r"^0::(/.*)$", "sys/fs/cgroup", ("cpu.max",)),
    (r"^\d+:(?:\S+,)?cpu(?:,\S+)?:(/.*)$", "sys/fs/cgroup/cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
)
# The variables by which OpenMP (GNU's and LLVM's) decides how threads wait, and our values if the user sets none.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
# What malloc.h calls the settings.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# If output is not a terminal (a log, a batch system), a bar prints a line at this interval instead of redrawing.
_SECONDS_BETWEEN_LOG_LINES = 30

_quiet = threading.Event()
_most_processors: int | None = None
_thread_limit: str | None = None


def derive_seed(*names: int | str) -> int:
    """Return the seed of one piece of work, from all that identifies it; equal names give the same seed everywhere."""
    name = "/".join(map(str, names))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def versions() -> dict[str, str]:
    """Return the versions of LiteMIL, Python and the packages that can change a result."""
    ours = {"litemil": version_of("litemil"), "python": platform.python_version()}
    return ours | {name: version_of(name) for name in _RECORDED_PACKAGES}


@functools.cache
def version_of(package: str) -> str:
    """Return the version of a package, "not installed" if it is missing."""
    from importlib import metadata  # imports much that only this function needs

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def prepare_threads() -> None:
    """Set, in the environment, how threads wait and how many there may be, unless the user has. Call it before PyTorch
    is loaded.

    By default OpenMP's threads spin while they wait for each other, which takes processor time from each other and from
    everyone else on a busy machine; and OpenMP ignores a container's share of the processors.
    """
    global _thread_limit
    if not any(name in os.environ for name in WAITING):
        os.environ |= _ASLEEP
    if "OMP_NUM_THREADS" not in os.environ and processors() < visible_processors():
        _thread_limit = os.environ["OMP_NUM_THREADS"] = str(processors())


def threads_are_given() -> bool:
    """Return whether the user has set the number of threads, by OMP_NUM_THREADS."""
    return os.environ.get("OMP_NUM_THREADS", _thread_limit) != _thread_limit


def threads_wait_asleep() -> bool:
    """Return whether OpenMP's threads sleep while they wait."""
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" or os.environ.get("GOMP_SPINCOUNT") == "0"


def visible_processors() -> int:
    """Return how many processors this process may run on, whatever its share of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processors() -> int:
    """Return how many processors this process may use, at least 1: those it may run on, within its share in a batch job
    or container.
    """
    shares = [visible_processors(), *shares_of_processors()]
    return max(1, min(int(min(shares)), _most_processors or shares[0]))


def share_processors(count: int | None) -> None:
    """Use at most `count` processors from now on; None lifts the limit."""
    global _most_processors
    _most_processors = count


def threads_in_use() -> int | None:
    """Return how many threads PyTorch computes on; None if it is not loaded, and will choose their number."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def use_threads(count: int | None) -> None:
    """Let PyTorch compute on `count` threads from now on. Do nothing for None, or if PyTorch is not loaded: its import
    takes seconds, which a process that does not need it is spared.
    """
    torch = sys.modules.get("torch")
    if torch is not None and count is not None:
        torch.set_num_threads(count)


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors of up to 32 MiB, the most it allows, for the next ones; otherwise each
    batch returns it and fetches it again page by page. Do nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def available_memory() -> int | None:
    """Return the bytes of free memory within a batch job's or container's limits; None if the system does not say."""
    free = system_memory()
    return free if free is None else min([free, *free_within_limits()])


def system_memory() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        # It includes caches that the kernel could free; the pages that sysconf counts do not.
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if match:
            return int(match[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def free_within_limits(root: Path = Path("/")) -> list[int]:
    """Return the bytes left of each memory limit that a batch system or container sets on this process."""
    free = (
        _free_of(group, limit, used)
        for line, mount, limit, used in _MEMORY_LIMITS
        for group in _groups(root, line, mount)
    )
    return [count for count in free if count is not None]


def shares_of_processors(root: Path = Path("/")) -> list[float]:
    """Return the processors, or fractions of one, that each limit of a batch system or container allows."""
    shares = (
        _share_of(group, files) for line, mount, files in _PROCESSOR_LIMITS for group in _groups(root, line, mount)
    )
    return [share for share in shares if share is not None]


def _groups(root: Path, line: str, mount: str) -> list[Path]:
    """Return the folders of this process's cgroups that match `line`, and of their parents."""
    try:
        membership = (root / "proc/self/cgroup").read_text()
    except OSError:
        return []
    groups = [Path(group) for group in re.findall(line, membership, re.MULTILINE)]
    return [root / mount / level.relative_to("/") for group in groups for level in (group, *group.parents)]


def _share_of(group: Path, files: Sequence[str]) -> float | None:
    try:
        quota, period = " ".join((group / name).read_text() for name in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # a group without a limit says "max", or has no such file
        return None


def _free_of(group: Path, limit: str, used: str) -> int | None:
    try:
        limit_bytes, used_bytes = int((group / limit).read_text()), int((group / used).read_text())
        statistics = (group / "memory.stat").read_text()
    except (OSError, ValueError):  # a group without a limit says "max", or has no such file
        return None
    # Cached file contents count as used, though they are freed on demand.
    caches = re.findall(r"^(?:total_)?inactive_file (\d+)", statistics, re.MULTILINE)
    return max(0, limit_bytes - used_bytes + max(map(int, caches), default=0))


def duration(seconds: float) -> str:
    """Return a time in words, as precise as an estimate is."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"


def file_size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, each made in a thread while the one before it is in use."""
    iterator = iter(items)

    def take_one() -> list[Item]:
        return list(itertools.islice(iterator, 1))

    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming = thread.submit(take_one)
        while item := upcoming.result():
            upcoming = thread.submit(take_one)
            yield from item


def progress(items: Iterable[Item], description: str, **bar: Any) -> "tqdm[Item]":
    """Return a tqdm bar over `items`; on a terminal it redraws, in a log it prints a line now and then."""
    return _bar_class()(items, desc=description, **_bar_settings(), **bar)


def progress_bar(description: str, total: int | None, **bar: Any) -> "tqdm[Any]":
    """Return a bar that is moved by hand, printed as that of `progress`."""
    return _bar_class()(desc=description, total=total, **_bar_settings(), **bar)


@functools.cache
def _bar_class() -> "type[tqdm[Any]]":
    """Import tqdm: not at once, as a command that shows its help needs no bar."""
    from tqdm import tqdm

    # Each process has its own bars; tqdm's own lock is shared with forked ones and stays taken when one is killed.
    tqdm.set_lock(threading.RLock())
    return tqdm


def _bar_settings() -> dict[str, Any]:
    if _quiet.is_set():
        return {"disable": True}
    terminal = sys.stderr.isatty()
    return {"mininterval": 0.1 if terminal else _SECONDS_BETWEEN_LOG_LINES, "dynamic_ncols": terminal}


class _BarFriendlyHandler(logging.Handler):
    """Writes log lines to stderr above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        _bar_class().write(prefix + record.getMessage(), file=sys.stderr)


def start_logging() -> None:
    """Send LiteMIL's log lines to stderr; the scripts call this, the library never does."""
    if not any(isinstance(handler, _BarFriendlyHandler) for handler in log.handlers):
        log.addHandler(_BarFriendlyHandler())
    log.setLevel(logging.INFO)
    log.propagate = False
    _quiet.clear()


def be_quiet() -> None:
    """Show no progress and no remarks from now on, only warnings and errors."""
    log.setLevel(logging.WARNING)
    _quiet.set()
