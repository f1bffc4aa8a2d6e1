"""Send batches and slides to a device ahead of their use."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.bags.chunks import Batch
from utils.core.runtime import prefetch

Item = TypeVar("Item", Batch, Tensor)


def batches_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on `device`. For a CUDA device each is collected in a thread, and copied on a stream of its
    own, while the one before it is in use; their features should lie in page-locked memory or on the device already.
    """
    if device.type != "cuda":
        return (batch.to(device) for batch in batches)
    return _ahead(batches, device, lambda batch: batch.to(device), lambda batch: batch.tensors)


def slides_ahead(slides: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield the features of slides, each `(N, D)`, on a CUDA device, read and copied in the same way; for other devices
    as they are.
    """
    if device.type != "cuda":
        return iter(slides)
    return _ahead(slides, device, lambda features: _sent(features, device), lambda features: (features,))


def _sent(features: Tensor, device: torch.device) -> Tensor:
    return features.pin_memory().to(device, non_blocking=True) if features.device.type == "cpu" else features


def _ahead(
    items: Iterable[Item],
    device: torch.device,
    send: Callable[[Item], Item],
    tensors_of: Callable[[Item], Sequence[Tensor]],
) -> Iterator[Item]:
    copies = torch.cuda.Stream(device)

    def sent() -> Iterator[tuple[Item, Any]]:
        with torch.cuda.device(copies.device):  # a thread begins on the first one
            for item in items:
                with torch.cuda.stream(copies):
                    moved = send(item), copies.record_event()
                yield moved

    for item, arrived in prefetch(sent()):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        for tensor in tensors_of(item):
            tensor.record_stream(computing)  # whose use of it must end before its memory is given to the next
        yield item
