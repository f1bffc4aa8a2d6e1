"""Provide a cohort's features from their files, from memory, or from one packed file.

files   read from disk at every request
memory  one block, filled slide by slide at the first request, shared with forked worker processes
packed  one file, read-only and mapped into memory, shared by every process that opens it
"""

import json
import mmap
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import filelock
import h5py
import numpy as np
import torch
from torch import Tensor

from utils.bags.direct_read import Fingerprint, RowMap
from utils.bags.store import BagInfo, read_features
from utils.core.errors import FeatureFileError
from utils.core.files import digest
from utils.core.passport import Passport
from utils.core.runtime import log, progress

_SCHEMA = 1
_TORCH = {"float16": torch.float16, "float32": torch.float32}
# Slides and arrays begin at whole pages.
_PAGE = 4096
FLUSH_BYTES = 2**28  # written between two flushes to disk, after which the slides are marked as done
_SPARE_BYTES = 2**26  # left free on the disk, for other files


class FileFeatures:
    """Reads each slide's features at every request, and remembers only where in the file they are. `home` is the folder
    that holds the files, possibly in subfolders (default: the first file's).
    """

    def __init__(
        self, paths: Sequence[Path], info: Sequence[BagInfo], feat_type: str, home: Path | None = None
    ) -> None:
        self.paths, self.info, self.feat_type = paths, info, feat_type
        self.home = home or paths[0].parent
        self._maps: dict[int, RowMap] = {}

    def __call__(self, slide: int) -> Tensor:
        """Read `(N, D)`, float16 or float32 as stored. Raises FeatureFileError if the file is damaged or changed."""
        if slide in self._maps:
            return torch.from_numpy(self._maps[slide].read())
        features, rows = read_features(self.paths[slide], self.feat_type)
        if Fingerprint.at(self.paths[slide]) != self.info[slide].fingerprint:
            raise FeatureFileError(f"{self.paths[slide]}: was changed while it was in use; start again")
        if rows is not None:
            self._maps[slide] = rows
        return torch.from_numpy(features)


class MemoryFeatures:
    """Holds the features in one block of memory, into which a slide's are read at the first request.

    Processes forked from this one share the block. A spawned process falls back to reading the files, so that no worker
    holds a second copy of the cohort.
    """

    def __init__(self, files: FileFeatures) -> None:
        self.files = files
        sizes = np.array([-(-info.nbytes // _PAGE) * _PAGE for info in files.info])
        self._starts = np.cumsum(sizes) - sizes  # one for each slide, so that one index serves all tables
        self._block = torch.frombuffer(mmap.mmap(-1, int(sizes.sum())), dtype=torch.uint8)
        self._is_read = torch.frombuffer(mmap.mmap(-1, len(sizes)), dtype=torch.bool)

    def __call__(self, slide: int) -> Tensor:
        info, start = self.files.info[slide], int(self._starts[slide])
        block = self._block[start : start + info.nbytes].view(_TORCH[info.dtype.name])
        features = block.view(info.num_instances, info.dim)
        if not self._is_read[slide]:
            features.copy_(self.files(slide))
            self._is_read[slide] = True
        return features

    def __reduce__(self) -> tuple[Callable[..., FileFeatures], tuple[Any, ...]]:
        return FileFeatures, (self.files.paths, self.files.info, self.files.feat_type, self.files.home)


@dataclass(frozen=True)
class _Entry:
    """A slide in a packed file: size and time of its feature file when it was packed, and the position of its features
    in the array of their dtype.
    """

    size: int
    mtime_ns: int
    dtype: str
    start: int
    num_instances: int
    dim: int
    passport: str | None

    @property
    def count(self) -> int:
        return self.num_instances * self.dim

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def is_of(self, path: Path) -> bool:
        """Return whether the feature file exists and is unchanged."""
        return Fingerprint.at(path) == Fingerprint(self.size, self.mtime_ns)

    def info(self) -> BagInfo:
        passport = None if self.passport is None else Passport.from_json(self.passport)
        source = Fingerprint(self.size, self.mtime_ns)
        return BagInfo(self.num_instances, self.dim, np.dtype(self.dtype), passport, source)


class PackedFeatures:
    """Provides the features of `paths` from a packed file; a slide's are a view of that file, not to be written to.

    It is an HDF5 file with the flat arrays `float16` and `float32`, and an `index` of the slides in them.
    """

    def __init__(self, packed: Path, paths: Sequence[Path], home: Path | None = None) -> None:
        self.packed, self.paths, self.home = packed, paths, home
        with h5py.File(packed, "r") as file:
            self.index = _read_index(file)
            self._offsets = _offsets(file)
        with packed.open("rb") as opened:
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def __call__(self, slide: int) -> Tensor:
        return self.of(self.index[_name_in(self.home, self.paths[slide])])

    def __reduce__(self) -> tuple[type["PackedFeatures"], tuple[Path, Sequence[Path], Path | None]]:
        return PackedFeatures, (self.packed, self.paths, self.home)

    def info(self, path: Path) -> BagInfo | None:
        """Return the BagInfo of a feature file; None unless it was packed and has not changed since."""
        entry = self.index.get(_name_in(self.home, path))
        return entry.info() if entry is not None and entry.is_of(path) else None

    def of(self, entry: _Entry) -> Tensor:
        start = self._offsets[entry.dtype] + entry.start * entry.itemsize
        length = entry.count * entry.itemsize
        if hasattr(mmap, "MADV_WILLNEED"):
            # The system then reads missing pages in one go, not one by one in random order.
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + length - page)
        return self._bytes[start : start + length].view(_TORCH[entry.dtype]).view(entry.num_instances, entry.dim)


def packed_path(folder: Path, features_dir: Path, feat_type: str) -> Path:
    """Return the path of the packed file in `folder` for the feature files of `features_dir`."""
    home = str(features_dir.resolve())
    name = re.sub(r"[^\w.-]", "_", f"{features_dir.resolve().name}-{feat_type}")
    return folder / f"{name}-{digest(home, feat_type)[:8]}.packed"


def _name_in(home: Path | None, path: Path) -> str:
    """Return the key of a feature file in a packed file: its path in the folder `home`, or its name without one."""
    return path.name if home is None else path.relative_to(home).as_posix()


def open_packed(packed: Path, paths: Sequence[Path], home: Path | None = None) -> PackedFeatures | None:
    """Open the packed file; return None if there is none, or it is damaged, which is logged."""
    if not packed.is_file():
        return None
    try:
        return PackedFeatures(packed, paths, home)
    except (OSError, KeyError, ValueError, TypeError) as failure:
        log.warning("%s: not readable as a packed file (%s); it is written again", packed, failure)
        return None


def pack(packed: Path, files: FileFeatures) -> PackedFeatures:
    """Open the packed file of these features; write it first if it is missing, or a feature file is new or has changed.

    A packing that was killed is resumed. Raises FeatureFileError if a feature file is damaged or the packed file cannot
    be written.
    """
    opened = open_packed(packed, files.paths, files.home)
    if _holds(opened, files):
        return opened
    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        with _locked(packed):
            opened = open_packed(packed, files.paths, files.home)  # another process may have just written it
            if not _holds(opened, files):
                opened = _with_new_times(opened, files)
            if _holds(opened, files):
                return opened
            _write(packed, files, opened)
    except OSError as failure:
        raise FeatureFileError(
            f"{packed}: cannot be written ({failure.strerror or failure}); give --cache another folder, or off"
        ) from failure
    return PackedFeatures(packed, files.paths, files.home)


def _holds(opened: PackedFeatures | None, files: FileFeatures) -> TypeGuard[PackedFeatures]:
    """Return whether the packed file has all of these features, of the same fingerprints."""
    if opened is None:
        return False
    packed = [opened.info(path) for path in files.paths]
    return all(old and old.fingerprint == info.fingerprint for old, info in zip(packed, files.info, strict=True))


def _with_new_times(opened: PackedFeatures | None, files: FileFeatures) -> PackedFeatures | None:
    """Return the packed file, after updating its index for feature files that only have another time, and still the
    features that are packed.
    """
    if opened is None:
        return None
    index = dict(opened.index)
    for slide, (path, info) in enumerate(zip(files.paths, files.info, strict=True)):
        name = _name_in(files.home, path)
        entry = index.get(name)
        if entry is None or info.fingerprint is None or entry.info() != info or entry.size != info.fingerprint.size:
            continue
        if entry.mtime_ns != info.fingerprint.mtime_ns and torch.equal(opened.of(entry), files(slide)):
            index[name] = replace(entry, mtime_ns=info.fingerprint.mtime_ns)
    text = _index_text(index)
    with h5py.File(opened.packed, "r+") as file:
        length = file["index"].shape[0]  # type: ignore[union-attr]
        if index == opened.index or len(text) > length:
            return opened
        file["index"][...] = np.frombuffer(text.ljust(length), np.uint8)  # type: ignore[index]
    return open_packed(opened.packed, files.paths, files.home)


def _write(packed: Path, files: FileFeatures, old: PackedFeatures | None) -> None:
    """Write the packed file: copy from `old` the features of unchanged files, read the others."""
    home, slides = files.home, {_name_in(files.home, path): slide for slide, path in enumerate(files.paths)}
    unchanged = {name: entry for name, entry in old.index.items() if entry.is_of(home / name)} if old else {}
    index = _index(files, unchanged)
    unfinished = packed.with_name(f"{packed.name}.part")
    offsets, is_done = _prepare(unfinished, index)

    def features_of(name: str) -> Tensor:
        return old.of(unchanged[name]) if old and name in unchanged else files(slides[name])

    with unfinished.open("r+b") as file:
        unflushed: list[int] = []
        unflushed_bytes = 0
        for number, (name, entry) in enumerate(progress(index.items(), "Packing features", unit="slide")):
            if is_done[number]:
                continue
            file.seek(offsets[entry.dtype] + entry.start * entry.itemsize)
            file.write(features_of(name).numpy().reshape(-1).view(np.uint8).data)
            if not entry.is_of(home / name):
                raise FeatureFileError(f"{home / name}: was changed while it was packed; start again")
            unflushed.append(number)
            unflushed_bytes += entry.count * entry.itemsize
            if unflushed_bytes >= FLUSH_BYTES:
                _mark_done(file, offsets["done"], unflushed)
                unflushed, unflushed_bytes = [], 0
        _mark_done(file, offsets["done"], unflushed)
    unfinished.replace(packed)


def _index(files: FileFeatures, unchanged: dict[str, _Entry]) -> dict[str, _Entry]:
    """Lay out the packed file: the unchanged entries of the old one, and these files."""
    contents = {name: entry.info() for name, entry in unchanged.items()}
    contents |= {_name_in(files.home, path): info for path, info in zip(files.paths, files.info, strict=True)}
    ends = dict.fromkeys(_TORCH, 0)
    index = {}
    for name, info in contents.items():
        source, kind = info.fingerprint, info.dtype.name
        assert source is not None  # noqa: S101 - for the type checker: `peek_bag` sets it
        passport = None if info.passport is None else info.passport.to_json()
        index[name] = _Entry(source.size, source.mtime_ns, kind, ends[kind], info.num_instances, info.dim, passport)
        ends[kind] += info.num_instances * info.dim
    return index


def _prepare(unfinished: Path, index: dict[str, _Entry]) -> tuple[dict[str, int], np.ndarray]:
    """Return the byte offsets of the arrays in the file to fill, and which slides a killed packing has written."""
    text = _index_text(index)
    state = _resumed(unfinished, text)
    if state is None:
        unfinished.unlink(missing_ok=True)
        _lay_out(unfinished, index, text)
        state = _resumed(unfinished, text)
        assert state is not None  # noqa: S101 - for the type checker: it was just laid out
    else:
        log.info("%s: goes on after %d of %d slides", unfinished, int(state[1].sum()), len(index))
    return state


def _index_text(index: dict[str, _Entry]) -> bytes:
    return json.dumps({name: asdict(entry) for name, entry in index.items()}).encode()


def _resumed(unfinished: Path, text: bytes) -> tuple[dict[str, int], np.ndarray] | None:
    """Return what `_prepare` does for an unfinished file with this very index, or None."""
    try:
        with h5py.File(unfinished, "r") as opened:
            file: Any = opened
            return (_offsets(file), file["done"][()]) if file["index"][()].tobytes() == text else None
    except (OSError, KeyError):  # it does not exist, or its layout is incomplete
        return None


def _lay_out(unfinished: Path, index: dict[str, _Entry], text: bytes) -> None:
    """Create the packed file with space for the features, which are not written yet."""
    lengths = {kind: sum(entry.count for entry in index.values() if entry.dtype == kind) for kind in _TORCH}
    needed = sum(length * np.dtype(kind).itemsize for kind, length in lengths.items()) + len(text)
    folder = unfinished.parent
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise FeatureFileError(
            f"{folder}: {free / 1e9:.1f} GB free, the packed features take {needed / 1e9:.1f} GB; give --cache "
            "another folder, or off"
        )
    log.info("%s: packing the features of %d slides, %.2f GB", folder, len(index), needed / 1e9)
    with h5py.File(unfinished, "w", alignment_threshold=1, alignment_interval=_PAGE) as file:
        file.attrs["litemil_packed"] = _SCHEMA
        file["index"] = np.frombuffer(text, np.uint8)
        file["done"] = np.zeros(len(index), np.uint8)
        for kind, length in lengths.items():
            if length:
                _lay_out_array(file, kind, length)


def _lay_out_array(file: h5py.File, kind: str, length: int) -> None:
    """Allocate a contiguous array without writing any values."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((length,))
    h5py.h5d.create(file.id, kind.encode(), h5py.h5t.py_create(np.dtype(kind)), space, settings)


def _offsets(file: Any) -> dict[str, int]:
    return {name: file[name].id.get_offset() for name in ("done", *_TORCH) if name in file}


def _read_index(file: Any) -> dict[str, _Entry]:
    if file.attrs.get("litemil_packed") != _SCHEMA:
        raise ValueError("of another format")
    return {name: _Entry(**entry) for name, entry in json.loads(file["index"][()].tobytes()).items()}


def _mark_done(file: Any, offset: int, numbers: list[int]) -> None:
    file.flush()
    os.fsync(file.fileno())
    for number in numbers:
        file.seek(offset + number)
        file.write(b"\1")


@contextmanager
def _locked(packed: Path) -> Iterator[None]:
    """Lock the packed file against other processes; wait while another holds the lock."""
    lock = filelock.FileLock(f"{packed}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("%s: another process is packing these features; waiting for it", packed)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
