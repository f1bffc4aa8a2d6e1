"""Read the rows of an HDF5 dataset straight from the file.

HDF5 reads a chunked dataset through its chunk cache, one chunk after the other, and other toolkits' chunks hold 1 or 32
patches. Without filters a chunk is plain bytes at a known offset, and most chunks are contiguous: a few large reads
fetch them all.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from utils.core.errors import FeatureFileError

_PLAIN_TYPES = tuple(np.dtype(code) for code in ("float16", "float32", "float64"))


@dataclass(frozen=True)
class Fingerprint:
    """The size and time of a file, by which a change is noticed."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Fingerprint":
        return cls(status.st_size, status.st_mtime_ns)

    @classmethod
    def at(cls, path: Path) -> "Fingerprint | None":
        """Return the file's fingerprint; None if there is no file."""
        return cls.of(path.stat()) if path.is_file() else None


@dataclass(frozen=True)
class RowMap:
    """Where the rows of an array `(N, D)` are in a file: run k has rows `starts[k]` to `starts[k + 1] - 1`, which are
    contiguous from byte `offsets[k]` on.
    """

    path: Path
    fingerprint: Fingerprint
    shape: tuple[int, int]
    dtype: np.dtype
    starts: np.ndarray
    offsets: np.ndarray

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows `start` to `stop - 1`, `(n, D)`. Raises FeatureFileError if the file has changed since."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        rows = np.empty((max(0, stop - start), self.shape[1]), self.dtype)
        self.read_into(rows, start)
        return rows

    def read_into(self, rows: np.ndarray, start: int = 0) -> None:
        """Fill the C-contiguous `rows (n, D)` with rows `start` to `start + n - 1`."""
        target = rows.reshape(-1).view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as file:
                if Fingerprint.of(os.fstat(file.fileno())) != self.fingerprint:
                    raise FeatureFileError(f"{self.path}: was changed while it was in use; start again")
                for offset, length in self._pieces(start, start + len(rows)):
                    _read_exactly(file, offset, target[:length])
                    target = target[length:]
        except OSError as failure:
            raise FeatureFileError(f"{self.path}: cannot be read ({failure.strerror or failure})") from failure

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the (byte offset, number of bytes) of each contiguous piece of the rows, in their order."""
        row_bytes = self.shape[1] * self.dtype.itemsize
        run = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            count = min(int(self.starts[run + 1]), stop) - start
            yield int(self.offsets[run]) + (start - int(self.starts[run])) * row_bytes, count * row_bytes
            start, run = start + count, run + 1


def map_rows(dataset: h5py.Dataset, path: Path) -> RowMap | None:
    """Return where the rows of `dataset` are in its file; None unless they are plain bytes there: without filters, in
    native byte order, in chunks as wide as the dataset, all written, in this file and before its end.
    """
    if not _is_plain(dataset):
        return None
    chunks = _chunk_offsets(dataset) if dataset.chunks else np.array([[0, dataset.id.get_offset()]], dtype=np.uint64)
    if chunks is None:
        return None
    status = os.fstat(dataset.file.id.get_vfd_handle())
    if not os.path.samestat(status, path.stat()):
        return None
    fingerprint = Fingerprint.of(status)
    starts, offsets = np.append(chunks[:, 0], np.uint64(dataset.shape[0])), chunks[:, 1]
    sizes = np.diff(starts) * np.uint64(dataset.shape[1] * dataset.dtype.itemsize)
    # In a damaged file offsets can be so large that adding to them overflows.
    if offsets.max() > fingerprint.size or (offsets + sizes).max() > fingerprint.size:
        return None
    first = np.flatnonzero(np.append(True, offsets[1:] != offsets[:-1] + sizes[:-1]))
    runs = starts[[*first, -1]].astype(np.int64), offsets[first].astype(np.int64)
    return RowMap(path, fingerprint, dataset.shape, dataset.dtype, *runs)


def _is_plain(dataset: Any) -> bool:
    return (
        dataset.ndim == 2
        and 0 not in dataset.shape
        and dataset.dtype in _PLAIN_TYPES
        and dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype))
        and dataset.file.driver == "sec2"
        and dataset.file.userblock_size == 0
        and dataset.id.get_create_plist().get_nfilters() == 0
        and (dataset.chunks is not None or dataset.id.get_offset() is not None)
    )


def _chunk_offsets(dataset: Any) -> np.ndarray | None:
    """Return each chunk's first row and byte offset, `(K, 2)` uint64, in the rows' order; None unless all K exist."""
    rows, dim = dataset.chunks
    if dim != dataset.shape[1]:
        return None
    listed: list[tuple[int, int]] = []
    dataset.id.chunk_iter(lambda chunk: listed.append((chunk.chunk_offset[0], chunk.byte_offset)))
    if len(listed) != -(-dataset.shape[0] // rows):  # in a damaged file the shape may be anything
        return None
    chunks = np.array(sorted(listed), dtype=np.uint64).reshape(-1, 2)
    return chunks if np.array_equal(chunks[:, 0], np.arange(0, dataset.shape[0], rows)) else None


def _read_exactly(file: RawIOBase, offset: int, target: memoryview) -> None:
    file.seek(offset)
    while target:
        count = file.readinto(target)
        if not count:
            raise OSError("the file ends before its data")
        target = target[count:]
