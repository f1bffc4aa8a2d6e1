"""Write a bag piece by piece, as HDF5 or PyTorch, in the layout that `store` describes."""

import io
import json
import os
from typing import IO, Any

import h5py
import numpy as np
import torch

from utils.core.passport import Passport
from utils.core.recipe import Recipe
from utils.core.tensor_files import tensor_bytes

PASSPORT = "litemil_passport"  # the attribute of the file's root
# Everything in our files begins at a multiple of this, so that the features begin at the same place in all of them.
_ALIGNMENT = 512


class BagWriter:
    """Takes the features first, then the rest of a bag; made by `store.bag_writer`."""

    def __init__(self, file: IO[bytes], dim: int, dtype: np.dtype) -> None:
        self.file, self.dim, self.dtype, self.num_instances = file, dim, dtype, 0

    def append(self, features: np.ndarray) -> None:
        self.num_instances += len(features)
        self._append(np.ascontiguousarray(features, self.dtype))

    def finish(self, coords: np.ndarray | None, patch_size_level0: int | None, passport: Passport | None) -> None:
        raise NotImplementedError

    def _append(self, features: np.ndarray) -> None:
        raise NotImplementedError


class HDF5Writer(BagWriter):
    """Writes the features itself, and at the end the rest of the file around them, which HDF5 makes in memory: HDF5
    would end the process when the disk fills up, and needs the number of patches beforehand.
    """

    def __init__(self, file: IO[bytes], dim: int, dtype: np.dtype) -> None:
        super().__init__(file, dim, dtype)
        self.start = self._frame(1, None, None, None)[1]
        file.seek(self.start)

    def _append(self, features: np.ndarray) -> None:
        self.file.write(features.data)

    def finish(self, coords: np.ndarray | None, patch_size_level0: int | None, passport: Passport | None) -> None:
        frame, start = self._frame(self.num_instances, coords, patch_size_level0, passport)
        assert start == self.start  # noqa: S101 - what precedes the features does not depend on what follows
        for offset, content in frame.blocks.items():
            self.file.seek(offset)
            self.file.write(content)
        self.file.truncate(frame.length)

    def _frame(
        self, rows: int, coords: np.ndarray | None, patch_size_level0: int | None, passport: Passport | None
    ) -> tuple["_Frame", int]:
        """Return the file without its features, and the byte offset at which they begin."""
        frame = _Frame()
        unwritten = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        unwritten.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        unwritten.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        with h5py.File(frame, "w", alignment_threshold=1, alignment_interval=_ALIGNMENT) as file:
            features = file.create_dataset("features", (rows, self.dim), self.dtype, dcpl=unwritten)
            start = features.id.get_offset()
            features.attrs.update(_trident_feature_attributes(passport))
            if coords is not None:
                dataset = file.create_dataset("coords", data=coords.astype(np.int64))
                dataset.attrs.update(_trident_coord_attributes(passport, patch_size_level0))
            if passport is not None:
                file.attrs[PASSPORT] = passport.to_json()
        return frame, start


class _Frame(io.RawIOBase):
    """A file in memory that keeps only the blocks written to it, by their offset."""

    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}
        self.length = self.position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def truncate(self, size: int | None = None) -> int:
        self.length = self.position if size is None else size
        return self.length

    def write(self, content: Any) -> int:
        self.blocks[self.position] = bytes(content)
        self.position += len(content)
        self.length = max(self.length, self.position)
        return len(content)


class TensorWriter(BagWriter):
    def __init__(self, file: IO[bytes], dim: int, dtype: np.dtype) -> None:
        super().__init__(file, dim, dtype)
        self.batches = [np.empty((0, dim), dtype)]

    def _append(self, features: np.ndarray) -> None:
        self.batches.append(features)

    def finish(self, coords: np.ndarray | None, patch_size_level0: int | None, passport: Passport | None) -> None:
        coords = np.empty((0, 2), np.int64) if coords is None else coords.astype(np.int64)
        content = {
            "features": _as_tensor(np.concatenate(self.batches)),
            "coords": _as_tensor(coords),
            "metadata": json.loads(passport.to_json()) if passport else {},
        }
        if patch_size_level0 is not None:
            content["patch_size_level0"] = patch_size_level0
        self.file.write(tensor_bytes(content))


def _as_tensor(values: np.ndarray) -> torch.Tensor:
    # PyTorch takes arrays that are writable, and saves the whole memory a view looks into.
    return torch.from_numpy(np.require(values, requirements=("C", "W")))


def _trident_feature_attributes(passport: Passport | None) -> dict[str, str]:
    slide, recipe = (passport.slide, passport.recipe) if passport else ({}, Recipe())
    return {"name": str(slide.get("name")), "encoder": str(recipe.backbone), "savetodir": "."}


def _trident_coord_attributes(passport: Passport | None, patch_size_level0: int | None) -> dict[str, Any]:
    slide, recipe = (passport.slide, passport.recipe) if passport else ({}, Recipe())
    patch_size, stride, mpp = recipe.patch_size, recipe.stride, slide.get("mpp_delivered")
    values = {
        "patch_size": patch_size,
        "patch_size_level0": patch_size_level0,
        "level0_magnification": slide.get("objective"),
        "target_magnification": recipe.magnification or (None if mpp is None else round(10 / mpp, 2)),
        "overlap": None if patch_size is None or stride is None else patch_size - stride,
        "level0_width": slide.get("width"),
        "level0_height": slide.get("height"),
        "name": slide.get("name"),
    }
    # TRIDENT writes an unknown value as the word None.
    return {name: "None" if value is None else value for name, value in values.items()}
