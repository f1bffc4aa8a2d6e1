"""Write files that are whole or absent, claim them among processes, and read and write JSON and tables.

A file is written under a temporary name in the same folder, flushed to disk and renamed, so that a killed process never
leaves half a file under the final name.
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
SECONDS_WITHOUT_A_SIGN = 600  # after which another machine's claim is taken over
_SECONDS_TO_SIGN = 60
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


@contextmanager
def whole_file(path: Path, error: type[LiteMILError] = LiteMILError) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, otherwise remove it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        owner = f"{machine_name()}-{os.getpid()}"
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.{owner}.", suffix=".part", dir=path.parent)
    except OSError as failure:
        kind = _kind_of(failure, error)
        raise kind(f"{path}: cannot be written ({failure.strerror}); choose another output folder") from failure
    unfinished = Path(name)
    try:
        os.close(handle)
        yield unfinished
        # mkstemp makes private files; the result gets the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o666 & ~umask)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as failure:
        reason, kind = failure.strerror or failure, _kind_of(failure, error)
        raise kind(f"{path}: cannot be written ({reason}); free some space, or choose another folder") from failure
    finally:
        unfinished.unlink(missing_ok=True)


def _kind_of(failure: OSError, error: type[LiteMILError]) -> type[LiteMILError]:
    return DiskFullError if failure.errno in _NO_SPACE else error


@contextmanager
def claimed(path: Path, seconds: float = 0.1) -> Iterator[str]:
    """Yield "" if this process may make a file; else, after `seconds`, the process that may.

    A claim is a hidden file beside it, which works on network file systems too. The claim of a dead process is taken
    over: at once on the same machine, elsewhere after ten minutes without a sign of life. If no claim can be written,
    the file itself cannot either, and writing it will say so.
    """
    claim, other_process = claim_on(path), ""
    try:
        _remove_unsigned(claim)
        claim.acquire(timeout=seconds)
    except filelock.Timeout:
        owner = claim.owner
        other_process = f"process {owner.pid} on {_node(owner)}" if owner else "another process"
    except OSError:
        pass
    try:
        yield other_process
    finally:
        claim.release()


def claim_on(path: Path) -> filelock.SoftFileLease:
    """Return a claim on making a file, not taken yet. The death of an owner on another machine shows only with time, so
    use the same claim for all attempts.
    """
    return _claim(path.with_name(f".{path.name}.claim"))


def is_free(claim: filelock.SoftFileLease) -> bool:
    """Return whether no living process holds the claim."""
    try:
        _remove_unsigned(claim)
        with claim.acquire(blocking=False):
            return True
    except filelock.Timeout:
        return False
    except OSError:  # as in `claimed`
        return True


def _claim(file: Path) -> filelock.SoftFileLease:
    return filelock.SoftFileLease(file, lease_duration=SECONDS_WITHOUT_A_SIGN)


def _remove_unsigned(claim: filelock.SoftFileLease) -> None:
    """Remove a claim that has been empty for a minute. Its process was killed before it could write its name there, and
    a lock without a name is held for ever.
    """
    file = Path(claim.lock_file)
    with suppress(FileNotFoundError):
        status = file.stat()
        if status.st_size == 0 and time.time() - status.st_mtime > _SECONDS_TO_SIGN:
            file.unlink()


def _node(owner: filelock.OwnerRecord) -> str:
    return owner.hostname.partition("?")[0]  # a container's name is longer


def wait_for_file(path: Path, seconds: float = 60) -> Path:
    """Wait until the path exists, up to `seconds`, and return it: network file systems can take a while to show a file
    that another machine has just written.
    """
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path


def check_writable(folder: Path) -> None:
    """Make the folder if it is missing; raise ConfigError if no file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as failure:
        raise ConfigError(
            f"{folder}: cannot be written ({failure.strerror}); choose another output folder"
        ) from failure


def set_aside(*paths: Path) -> list[Path]:
    """Move files out of the way, to `<stem>.<number>` beside them with the next free number; return the new paths."""
    number = 1
    while any(_numbered(path, number).exists() for path in paths):
        number += 1
    return [path.rename(_numbered(path, number)) for path in paths]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def clear_parts(folder: Path) -> None:
    """Remove what killed processes of this machine left in a folder, half-written files and claims; and half-written
    files of other machines that have not changed for a day.
    """
    for claim in folder.glob(".*.claim"):
        is_free(_claim(claim))
    for unfinished in folder.glob(".*.part"):
        owner = re.search(r"\.(\w+)-(\d+)\.[^.]*\.part$", unfinished.name)
        if owner is None:
            continue
        with suppress(OSError):  # it has been renamed since, or is another user's
            is_abandoned = _is_forgotten(unfinished) if owner[1] != machine_name() else not _is_running(int(owner[2]))
            if is_abandoned:
                unfinished.unlink()


def _is_forgotten(unfinished: Path) -> bool:
    return time.time() - unfinished.stat().st_mtime > _SECONDS_TO_BE_FORGOTTEN


def clear_parts_of(node: str, process: int, folder: Path) -> None:
    """Remove the half-written files and claims of a dead process, anywhere below a folder."""
    for claim in map(_claim, folder.rglob(".*.claim")):
        owner = claim.owner
        if owner and (machine_name(_node(owner)), owner.pid) == (machine_name(node), process):
            claim.break_lock()
    for unfinished in folder.rglob(f".*.{machine_name(node)}-{process}.*.part"):
        unfinished.unlink(missing_ok=True)


def machine_name(node: str = "") -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", node or platform.node())[:60]


def _is_running(process: int) -> bool:
    if os.name != "posix":  # os.kill would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_bytes(path: Path, content: bytes) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write valid JSON; raise ValueError for a NaN or an infinity."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_records(path: Path, records: Sequence[Any], kind: type | None = None) -> None:
    """Write dataclasses of one kind as a CSV table: a column per field, None as an empty cell.

    `kind` is their class, needed if there may be none.
    """
    names = [field.name for field in dataclasses.fields(kind or records[0])]
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(names)
    lines.writerows([getattr(record, name) for name in names] for record in records)
    write_text(path, table.getvalue())


def check_distinct(targets: Mapping[Path, Path], remedy: str = "rename one of them") -> None:
    """Raise ConfigError if two sources (the keys) would be written to one file (the values)."""
    owners: dict[Path, Path] = {}
    for source, target in targets.items():
        owner = owners.setdefault(target, source)
        if owner is not source:
            raise ConfigError(f"{owner} and {source} would both be written to {target}; {remedy}")


def read_json(path: Path, error: type[LiteMILError] = LiteMILError) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as failure:
        raise error(f"{path}: not readable as JSON ({failure})") from failure


def read_record(path: Path) -> dict[str, Any]:
    """Return the object in the JSON file `path`; an empty one if there is none that can be read."""
    try:
        record = read_json(path) if path.exists() else {}
    except LiteMILError:
        return {}
    return record if isinstance(record, dict) else {}


def digest(*contents: str | bytes) -> str:
    """Return the SHA-256 of contents, each preceded by its length so that ("ab", "c") and ("a", "bc") differ."""
    total = hashlib.sha256()
    for content in contents:
        data = content.encode() if isinstance(content, str) else content
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()
