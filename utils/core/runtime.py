"""Where and how a process runs: device, seeds, threads, log lines, progress bars, and the record of all that."""

import ctypes
import hashlib
import importlib.metadata
import itertools
import logging
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

log = logging.getLogger("litemil")
Item = TypeVar("Item")

_RECORDED_PACKAGES = ("torch", "numpy", "timm", "h5py", "openslide-python", "openslide-bin", "scikit-learn")
# Where cgroups, version 2 and version 1, tell a memory limit: the line of /proc/self/cgroup, the mount, limit and use.
_MEMORY_LIMITS = (
    (r"^0::(/.*)$", "sys/fs/cgroup", "memory.max", "memory.current"),
    (r"^\d+:memory:(/.*)$", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# What malloc.h calls the settings.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Where output is not a terminal (a log, a batch system), a bar prints a line at this interval instead of redrawing.
_SECONDS_BETWEEN_LOG_LINES = 30

_quiet = threading.Event()
_most_processors: int | None = None
# Each process has its own bars; tqdm's own lock is shared with forked ones and stays taken when one is killed.
tqdm.set_lock(threading.RLock())


def derive_seed(*parts: int | str) -> int:
    """A seed for one piece of work from everything that identifies it; the same parts give the same seed everywhere."""
    name = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def versions() -> dict[str, str]:
    """LiteMIL's, Python's and the packages' versions that can change a number."""
    found = {"litemil": _version("litemil"), "python": platform.python_version()}
    return found | {name: _version(name) for name in _RECORDED_PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processors() -> int:
    """How many this process may use, which on a cluster is fewer than there are."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(there, _most_processors or there)


def share_processors(count: int) -> None:
    """Use no more than so many from here on."""
    global _most_processors
    _most_processors = count


def keep_freed_memory() -> None:
    """Let the C library (glibc; elsewhere nothing happens) keep what freed tensors of up to 32 MiB, the most it allows,
    took, for the next ones: it is handed back and fetched again page by page in every batch otherwise.
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
    """Bytes of memory free for use, within a batch job's or container's limits; None where the system does not tell."""
    free = _system_memory()
    return free if free is None else min([free, *_left_of_limits()])


def _system_memory() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        # What the kernel could hand out, caches included; the pages that sysconf counts leave them out.
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return int(found[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _left_of_limits(root: Path = Path("/")) -> list[int]:
    """The bytes left of each memory limit that a batch system or a container sets on this process."""
    try:
        membership = (root / "proc/self/cgroup").read_text()
    except OSError:
        return []
    groups = [
        (root / mount / level.relative_to("/"), limit, used)
        for line, mount, limit, used in _MEMORY_LIMITS
        for group in re.findall(line, membership, re.MULTILINE)
        for level in (Path(group), *Path(group).parents)
    ]
    return [left for group in groups if (left := _left_of(*group)) is not None]


def _left_of(group: Path, limit: str, used: str) -> int | None:
    try:
        bound, held = int((group / limit).read_text()), int((group / used).read_text())
        statistics = (group / "memory.stat").read_text()
    except (OSError, ValueError):  # a group without a limit says "max", or has no such file
        return None
    # Cached file contents count as held, though they are handed back on demand.
    caches = re.findall(r"^(?:total_)?inactive_file (\d+)", statistics, re.MULTILINE)
    return max(0, bound - held + max(map(int, caches), default=0))


def duration(seconds: float) -> str:
    """In words, as precise as an estimate is."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def file_size(count: float) -> str:
    """Bytes, in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made in a thread while the one before it is in use."""
    waiting = iter(items)

    def following() -> list[Item]:
        return list(itertools.islice(waiting, 1))

    with ThreadPoolExecutor(max_workers=1) as maker:
        upcoming = maker.submit(following)
        while made := upcoming.result():
            upcoming = maker.submit(following)
            yield from made


def progress(items: Iterable[Item], description: str, **bar: Any) -> "tqdm[Item]":
    """A tqdm bar over `items`; on a terminal it redraws, in a log it prints a line now and then."""
    return tqdm(items, desc=description, **_manners(), **bar)


def progress_bar(description: str, total: int | None, **bar: Any) -> tqdm:
    """A bar that is moved by hand, with the manners of `progress`."""
    return tqdm(desc=description, total=total, **_manners(), **bar)


def _manners() -> dict[str, Any]:
    if _quiet.is_set():
        return {"disable": True}
    terminal = sys.stderr.isatty()
    return {"mininterval": 0.1 if terminal else _SECONDS_BETWEEN_LOG_LINES, "dynamic_ncols": terminal}


class _BarFriendlyHandler(logging.Handler):
    """Writes log lines to stderr above whatever progress bar is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def start_logging() -> None:
    """Send LiteMIL's log lines to stderr; the scripts call this, the library never does."""
    if not any(isinstance(handler, _BarFriendlyHandler) for handler in log.handlers):
        log.addHandler(_BarFriendlyHandler())
    log.setLevel(logging.INFO)
    log.propagate = False
    _quiet.clear()


def be_quiet() -> None:
    """No progress and no remarks from here on: only warnings and errors."""
    log.setLevel(logging.WARNING)
    _quiet.set()
