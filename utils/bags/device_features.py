"""Keep a cohort's features on the device that trains, so that an epoch does not send them there again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.bags.packed import FileFeatures, MemoryFeatures, PackedFeatures
from utils.bags.store import BagInfo
from utils.core.device import free_memory
from utils.core.runtime import file_size, log

Source = FileFeatures | MemoryFeatures | PackedFeatures

# Features are kept on a device if they fit in this part of its free memory: one of so many.
_PARTS = 3
# Slides begin at whole multiples of this many bytes, as the device's own allocations do.
_ALIGNMENT = 512
# The most by which float16 may change a feature, as a share of its largest value on the slide: a spacing of float16.
_ROUNDING = 2**-10


def fits_on_device(total: int, free: int | None, processes: int = 1) -> bool:
    """Return whether each of so many processes may keep `total` bytes on a device with `free` bytes of memory: together
    they take a third of it at most. None is a device that does not say.
    """
    return free is not None and total * processes * _PARTS <= free


def survives_float16(features: Tensor) -> bool:
    """Return whether float16 holds `features (N, D)`: none of the D overflows or vanishes, and all are finite."""
    changes = (features.half().to(features.dtype) - features).abs().amax(dim=0)
    return bool((changes <= _ROUNDING * features.abs().amax(dim=0)).all())


class DeviceFeatures:
    """Holds the features of a `source` on a device, from the first request of each slide on, if they fit there.

    They are held in float16, or as stored if `is_exact`. A slide that float16 does not hold comes from the source, and
    so do all slides if they do not fit (see `fits_on_device`), or the memory has run out. What fits is decided at the
    first request, by each of the `processes` that share the device: a pickled copy is empty.
    """

    def __init__(
        self,
        source: Callable[[int], Tensor],
        info: Sequence[BagInfo],
        device: torch.device,
        *,
        processes: int = 1,
        is_exact: bool = False,
    ) -> None:
        self.source, self.info, self.device = source, info, device
        self.processes, self.is_exact = processes, is_exact
        self._dtypes = [_torch_dtype(each, is_exact) for each in info]
        self._starts: list[int] = []
        self.total = 0  # bytes
        for each, dtype in zip(info, self._dtypes, strict=True):
            self._starts.append(self.total)
            length = each.num_instances * each.dim * dtype.itemsize
            self.total += -(-length // _ALIGNMENT) * _ALIGNMENT
        self._is_decided = False
        self._block: Tensor | None = None
        self._on_device: set[int] = set()
        self._refused: set[int] = set()

    def __call__(self, slide: int) -> Tensor:
        """Return `(N, D)`, on the device or, as stored, from the source."""
        if not self._is_decided:
            self._block = self._reserved()
            self._is_decided = True
        if self._block is None or slide in self._refused:
            return self.source(slide)
        info, dtype, start = self.info[slide], self._dtypes[slide], self._starts[slide]
        length = info.num_instances * info.dim * dtype.itemsize
        features = self._block[start : start + length].view(dtype).view(info.num_instances, info.dim)
        if slide not in self._on_device:
            stored = self.source(slide)
            sent = stored.to(self.device)
            if dtype is not stored.dtype and not survives_float16(sent):
                self._refused.add(slide)
                return stored
            features.copy_(sent)
            self._on_device.add(slide)
        return features

    def __reduce__(self) -> tuple[Callable[..., "DeviceFeatures"], tuple[Any, ...]]:
        return _of, (self.source, self.info, self.device, self.processes, self.is_exact)

    def _reserved(self) -> Tensor | None:
        """Return memory of the device for all slides, or None; log which."""
        size, free = file_size(self.total), free_memory(self.device)
        if not fits_on_device(self.total, free, self.processes):
            shared = "" if self.processes == 1 else f", which {self.processes} processes share"
            log.info(
                "%s: %s of features are not kept there, but sent in every epoch: they take more than a third of the %s "
                "free%s", self.device, size, file_size(free or 0), shared,
            )  # fmt: skip
            return None
        try:
            block = torch.empty(self.total, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:  # something else has taken it since
            log.info("%s: has no memory left for %s of features, which are sent in every epoch", self.device, size)
            return None
        log.info("%s: keeps %s of features after the first epoch", self.device, size)
        return block


def _of(
    source: Callable[[int], Tensor], info: Sequence[BagInfo], device: torch.device, processes: int, is_exact: bool
) -> DeviceFeatures:
    return DeviceFeatures(source, info, device, processes=processes, is_exact=is_exact)


def _torch_dtype(info: BagInfo, is_exact: bool) -> torch.dtype:
    return torch.float32 if is_exact and info.dtype.name == "float32" else torch.float16
