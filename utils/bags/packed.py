"""Where a cohort's features are while it is in use: in their files, in memory, or in one packed file.

files   read whenever they are asked for
memory  one block that slides enter as they are first asked for, shared with forked worker processes
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
# What is written is forced to disk, and noted as done, in parts of about this size.
_FLUSH_BYTES = 2**28
# Left free on the disk, for whatever else is written to it.
_SPARE_BYTES = 2**26


class FileFeatures:
    """Each slide's features are read when they are asked for; nothing is kept but where they lie. `home` is the folder
    that holds the files, if need be in subfolders (default: the first file's).
    """

    def __init__(
        self, paths: Sequence[Path], info: Sequence[BagInfo], feat_type: str, home: Path | None = None
    ) -> None:
        self.paths, self.info, self.feat_type = paths, info, feat_type
        self.home = home or paths[0].parent
        self._maps: dict[int, RowMap] = {}

    def __call__(self, slide: int) -> Tensor:
        """`(N, D)`, float16 or float32 as stored. Raises FeatureFileError for a file that is damaged or has changed."""
        if slide in self._maps:
            return torch.from_numpy(self._maps[slide].read())
        features, rows = read_features(self.paths[slide], self.feat_type)
        if Fingerprint.at(self.paths[slide]) != self.info[slide].fingerprint:
            raise FeatureFileError(f"{self.paths[slide]}: was changed while it was in use; start again")
        if rows is not None:
            self._maps[slide] = rows
        return torch.from_numpy(features)


class MemoryFeatures:
    """One block of memory that a slide's features enter when they are first asked for.

    Processes forked from this one see the same block. One that is started afresh gets the files instead: a second copy
    of a cohort is not what a worker is for.
    """

    def __init__(self, files: FileFeatures) -> None:
        self.files = files
        sizes = np.array([-(-info.nbytes // _PAGE) * _PAGE for info in files.info])
        self._starts = np.cumsum(sizes) - sizes  # one for each slide, so that one index serves all tables
        self._block = torch.frombuffer(mmap.mmap(-1, int(sizes.sum())), dtype=torch.uint8)
        self._is_there = torch.frombuffer(mmap.mmap(-1, len(sizes)), dtype=torch.bool)

    def __call__(self, slide: int) -> Tensor:
        info, start = self.files.info[slide], int(self._starts[slide])
        room = self._block[start : start + info.nbytes].view(_TORCH[info.dtype.name]).view(info.num_instances, info.dim)
        if not self._is_there[slide]:
            room.copy_(self.files(slide))
            self._is_there[slide] = True
        return room

    def __reduce__(self) -> tuple[Callable[..., FileFeatures], tuple[Any, ...]]:
        return FileFeatures, (self.files.paths, self.files.info, self.files.feat_type, self.files.home)


@dataclass(frozen=True)
class _Entry:
    """A slide in a packed file: the file it came from, as it was then, and where its features stand among those of
    their type.
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
        """Whether the feature file is there, unchanged."""
        return Fingerprint.at(path) == Fingerprint(self.size, self.mtime_ns)

    def info(self) -> BagInfo:
        passport = None if self.passport is None else Passport.from_json(self.passport)
        source = Fingerprint(self.size, self.mtime_ns)
        return BagInfo(self.num_instances, self.dim, np.dtype(self.dtype), passport, source)


class PackedFeatures:
    """The features of `paths` in a packed file; a slide's are a view of that file, not to be written to.

    It is an HDF5 file with the flat arrays `float16` and `float32`, and an `index` of what they hold.
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
        """What a feature file holds; None unless it was packed and has not changed since."""
        entry = self.index.get(_name_in(self.home, path))
        return entry.info() if entry is not None and entry.is_of(path) else None

    def of(self, entry: _Entry) -> Tensor:
        start = self._offsets[entry.dtype] + entry.start * entry.itemsize
        length = entry.count * entry.itemsize
        if hasattr(mmap, "MADV_WILLNEED"):
            # The system fetches what is not in memory yet in one go, not page by page in random order.
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + length - page)
        return self._bytes[start : start + length].view(_TORCH[entry.dtype]).view(entry.num_instances, entry.dim)


def packed_path(folder: Path, features_dir: Path, feat_type: str) -> Path:
    """The packed file in `folder` for the feature files of `features_dir`."""
    home = str(features_dir.resolve())
    name = re.sub(r"[^\w.-]", "_", f"{features_dir.resolve().name}-{feat_type}")
    return folder / f"{name}-{digest(home, feat_type)[:8]}.packed"


def _name_in(home: Path | None, path: Path) -> str:
    """Return what a packed file calls a feature file of the folder `home`, without which it is the file's name."""
    return path.name if home is None else path.relative_to(home).as_posix()


def open_packed(packed: Path, paths: Sequence[Path], home: Path | None = None) -> PackedFeatures | None:
    """The packed file, opened; None where there is none, or only a damaged one (said aloud)."""
    if not packed.is_file():
        return None
    try:
        return PackedFeatures(packed, paths, home)
    except (OSError, KeyError, ValueError, TypeError) as failure:
        log.warning("%s: not readable as a packed file (%s); it is made anew", packed, failure)
        return None


def pack(packed: Path, files: FileFeatures) -> PackedFeatures:
    """The packed file of these features; written where it is not there, or where a feature file is new or has changed.

    A packing that was killed goes on where it was. Raises FeatureFileError for a feature file that is damaged, and
    where the packed file cannot be written.
    """
    opened = open_packed(packed, files.paths, files.home)
    if _holds(opened, files):
        return opened
    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        with _alone(packed):
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
    """Whether the packed file has all of these features, as they were looked at."""
    if opened is None:
        return False
    found = [opened.info(path) for path in files.paths]
    return all(one and one.fingerprint == info.fingerprint for one, info in zip(found, files.info, strict=True))


def _with_new_times(opened: PackedFeatures | None, files: FileFeatures) -> PackedFeatures | None:
    """Return the packed file, its index brought up to date for feature files that were only touched: of another time,
    but with the features that are packed.
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
        room = file["index"].shape[0]  # type: ignore[union-attr]
        if index == opened.index or len(text) > room:
            return opened
        file["index"][...] = np.frombuffer(text.ljust(room), np.uint8)  # type: ignore[index]
    return open_packed(opened.packed, files.paths, files.home)


def _write(packed: Path, files: FileFeatures, old: PackedFeatures | None) -> None:
    """What `old` holds of files that are unchanged is copied, the rest read."""
    home, slides = files.home, {_name_in(files.home, path): slide for slide, path in enumerate(files.paths)}
    kept = {name: entry for name, entry in old.index.items() if entry.is_of(home / name)} if old else {}
    index = _index(files, kept)
    part = packed.with_name(f"{packed.name}.part")
    offsets, done = _prepare(part, index)

    def features_of(name: str) -> Tensor:
        return old.of(kept[name]) if old and name in kept else files(slides[name])

    with part.open("r+b") as file:
        waiting: list[int] = []
        held = 0
        for number, (name, entry) in enumerate(progress(index.items(), "Packing features", unit="slide")):
            if done[number]:
                continue
            file.seek(offsets[entry.dtype] + entry.start * entry.itemsize)
            file.write(features_of(name).numpy().reshape(-1).view(np.uint8).data)
            if not entry.is_of(home / name):
                raise FeatureFileError(f"{home / name}: was changed while it was packed; start again")
            waiting.append(number)
            held += entry.count * entry.itemsize
            if held >= _FLUSH_BYTES:
                _note_done(file, offsets["done"], waiting)
                waiting, held = [], 0
        _note_done(file, offsets["done"], waiting)
    part.replace(packed)


def _index(files: FileFeatures, kept: dict[str, _Entry]) -> dict[str, _Entry]:
    """What the packed file is to hold: what is kept of the old one, and these files."""
    known = {_name_in(files.home, path): info for path, info in zip(files.paths, files.info, strict=True)}
    known = {name: entry.info() for name, entry in kept.items()} | known
    ends = dict.fromkeys(_TORCH, 0)
    index = {}
    for name, info in known.items():
        source, kind = info.fingerprint, info.dtype.name
        assert source is not None  # noqa: S101 - for the type checker: whoever looked at a file knows it
        passport = None if info.passport is None else info.passport.to_json()
        index[name] = _Entry(source.size, source.mtime_ns, kind, ends[kind], info.num_instances, info.dim, passport)
        ends[kind] += info.num_instances * info.dim
    return index


def _prepare(part: Path, index: dict[str, _Entry]) -> tuple[dict[str, int], np.ndarray]:
    """The file to fill: where its arrays begin, and which slides an earlier, killed packing has written already."""
    text = _index_text(index)
    found = _begun(part, text)
    if found is None:
        part.unlink(missing_ok=True)
        _lay_out(part, index, text)
        found = _begun(part, text)
        assert found is not None  # noqa: S101 - for the type checker: it was just laid out
    else:
        log.info("%s: goes on after %d of %d slides", part, int(found[1].sum()), len(index))
    return found


def _index_text(index: dict[str, _Entry]) -> bytes:
    return json.dumps({name: asdict(entry) for name, entry in index.items()}).encode()


def _begun(part: Path, text: bytes) -> tuple[dict[str, int], np.ndarray] | None:
    """What `_prepare` gives, for a file with this very index; None where there is none."""
    try:
        with h5py.File(part, "r") as file:
            kept: Any = file
            return (_offsets(kept), kept["done"][()]) if kept["index"][()].tobytes() == text else None
    except (OSError, KeyError):  # it is not there, or was not laid out to its end
        return None


def _lay_out(part: Path, index: dict[str, _Entry], text: bytes) -> None:
    """The packed file without the features, which have their places in it."""
    lengths = {kind: sum(entry.count for entry in index.values() if entry.dtype == kind) for kind in _TORCH}
    needed = sum(length * np.dtype(kind).itemsize for kind, length in lengths.items()) + len(text)
    free = shutil.disk_usage(part.parent).free
    if needed + _SPARE_BYTES > free:
        raise FeatureFileError(
            f"{part.parent}: {free / 1e9:.1f} GB free, the packed features take {needed / 1e9:.1f} GB; give --cache "
            "another folder, or off"
        )
    log.info("%s: packing the features of %d slides, %.2f GB", part.parent, len(index), needed / 1e9)
    with h5py.File(part, "w", alignment_threshold=1, alignment_interval=_PAGE) as file:
        file.attrs["litemil_packed"] = _SCHEMA
        file["index"] = np.frombuffer(text, np.uint8)
        file["done"] = np.zeros(len(index), np.uint8)
        for kind, length in lengths.items():
            if length:
                _lay_out_array(file, kind, length)


def _lay_out_array(file: h5py.File, kind: str, length: int) -> None:
    """A contiguous array that has its place in the file, and no values yet."""
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


def _note_done(file: Any, offset: int, numbers: list[int]) -> None:
    file.flush()
    os.fsync(file.fileno())
    for number in numbers:
        file.seek(offset + number)
        file.write(b"\1")


@contextmanager
def _alone(packed: Path) -> Iterator[None]:
    """Two processes that need the same packed file: one writes it, the other waits."""
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
