"""Files that are whole or absent, and loading that executes nothing.

A file is written under a temporary name beside its place, flushed to disk and renamed, so that a killed process never
leaves half a file under the final name. PyTorch files are read with `weights_only=True`.
"""

import csv
import dataclasses
import errno
import hashlib
import io
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from utils.core.errors import ConfigError, DiskFullError, LiteMILError

_SECONDS_TO_BE_FORGOTTEN = 24 * 3600
_SECONDS_WITHOUT_A_SIGN = 600  # after which a claim of another machine's process is taken over
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


@contextmanager
def whole_file(path: Path, error: type[LiteMILError] = LiteMILError) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well, else remove it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        owner = f"{_machine()}-{os.getpid()}"
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.{owner}.", suffix=".part", dir=path.parent)
    except OSError as failure:
        kind = _kind_of(failure, error)
        raise kind(f"{path}: cannot be written ({failure.strerror}); choose another output folder") from failure
    part = Path(name)
    try:
        os.close(handle)
        yield part
        # mkstemp makes private files; the result gets the permissions any other new file would have.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except OSError as failure:
        reason, kind = failure.strerror or failure, _kind_of(failure, error)
        raise kind(f"{path}: cannot be written ({reason}); free some space, or choose another folder") from failure
    finally:
        part.unlink(missing_ok=True)


def _kind_of(failure: OSError, error: type[LiteMILError]) -> type[LiteMILError]:
    return DiskFullError if failure.errno in _NO_SPACE else error


@contextmanager
def claimed(path: Path, seconds: float = 0.1) -> Iterator[str]:
    """Yield "" while it is this process that may make a file, or else, after so many seconds, the one that may.

    A claim is a hidden file beside it, which network file systems keep as well. A dead process's is taken over: at once
    on its own machine, elsewhere when it has shown no sign of life for ten minutes. Where no claim can be written, nor
    can the file, which is left to tell.
    """
    claim, other = claim_on(path), ""
    try:
        claim.acquire(timeout=seconds)
    except filelock.Timeout:
        owner = claim.owner
        other = f"process {owner.pid} on {_node(owner)}" if owner else "another process"
    except OSError:
        pass
    try:
        yield other
    finally:
        claim.release()


def claim_on(path: Path) -> filelock.SoftFileLease:
    """A claim on making a file, not taken yet; only one that goes on looking learns of a death on another machine."""
    return _claim(path.with_name(f".{path.name}.claim"))


def is_free(claim: filelock.SoftFileLease) -> bool:
    """Whether nobody alive holds it."""
    try:
        with claim.acquire(blocking=False):
            return True
    except filelock.Timeout:
        return False
    except OSError:  # as in `claimed`
        return True


def _claim(file: Path) -> filelock.SoftFileLease:
    return filelock.SoftFileLease(file, lease_duration=_SECONDS_WITHOUT_A_SIGN)


def _node(owner: filelock.OwnerRecord) -> str:
    return owner.hostname.partition("?")[0]  # a container's has more to it


def wait_for_file(path: Path, seconds: float = 60) -> Path:
    """Wait until the path exists, up to `seconds`, and return it: network file systems can take a while to show a file
    that another machine has just written.
    """
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path


def check_writable(folder: Path) -> None:
    """Raise ConfigError where no file can be made in it; it is made itself where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as failure:
        raise ConfigError(
            f"{folder}: cannot be written ({failure.strerror}); choose another output folder"
        ) from failure


def set_aside(*paths: Path) -> list[Path]:
    """Move files out of the way, to `<stem>.<number>` beside them with the next free number, and return their new
    places.
    """
    number = 1
    while any(_numbered(path, number).exists() for path in paths):
        number += 1
    return [path.rename(_numbered(path, number)) for path in paths]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def clear_parts(folder: Path) -> None:
    """Remove files that killed processes left half-written in a folder, and their claims: those of dead processes of
    this machine; of other machines, files that nobody has written to for a day.
    """
    for claim in folder.glob(".*.claim"):
        is_free(_claim(claim))
    for part in folder.glob(".*.part"):
        found = re.search(r"\.(\w+)-(\d+)\.[^.]*\.part$", part.name)
        if found is None:
            continue
        with suppress(OSError):  # it has its name by now, or is another user's
            is_left = _is_forgotten(part) if found[1] != _machine() else not _is_running(int(found[2]))
            if is_left:
                part.unlink()


def _is_forgotten(part: Path) -> bool:
    return time.time() - part.stat().st_mtime > _SECONDS_TO_BE_FORGOTTEN


def clear_parts_of(node: str, process: int, folder: Path) -> None:
    """Remove what a dead process of a machine left half-written, or claimed, anywhere below a folder."""
    for claim in map(_claim, folder.rglob(".*.claim")):
        owner = claim.owner
        if owner and (_machine(_node(owner)), owner.pid) == (_machine(node), process):
            claim.break_lock()
    for part in folder.rglob(f".*.{_machine(node)}-{process}.*.part"):
        part.unlink(missing_ok=True)


def _machine(node: str = "") -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", node or platform.node())[:60]


def _is_running(process: int) -> bool:
    if os.name != "posix":  # nothing can be asked there without harm
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_bytes(path: Path, content: bytes) -> None:
    with whole_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write valid JSON: a NaN or an infinity raises ValueError instead of reaching the file."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_records(path: Path, records: Sequence[Any]) -> None:
    """Write dataclasses of one kind, at least one, as a CSV table: a column per field, empty where it is None."""
    names = [field.name for field in dataclasses.fields(records[0])]
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(names)
    lines.writerows([getattr(record, name) for name in names] for record in records)
    write_text(path, table.getvalue())


def check_distinct(targets: Mapping[Path, Path], remedy: str = "rename one of them") -> None:
    """Raise ConfigError when two sources (the keys) would be written to one file (the values)."""
    owners: dict[Path, Path] = {}
    for source, target in targets.items():
        other = owners.setdefault(target, source)
        if other is not source:
            raise ConfigError(f"{other} and {source} would both be written to {target}; {remedy}")


def read_json(path: Path, error: type[LiteMILError] = LiteMILError) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as failure:
        raise error(f"{path}: not readable as JSON ({failure})") from failure


def read_record(path: Path) -> dict[str, Any]:
    """Return the object in the JSON file `path`; an empty one where there is none that can be read."""
    try:
        record = read_json(path) if path.exists() else {}
    except LiteMILError:
        return {}
    return record if isinstance(record, dict) else {}


def digest(*parts: str | bytes) -> str:
    """The sha256 of the parts, each preceded by its length so that ("ab", "c") and ("a", "bc") differ."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()
