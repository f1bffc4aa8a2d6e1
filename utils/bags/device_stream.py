"""Send batches to a device ahead of their use."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from utils.bags.chunks import Batch
from utils.core.runtime import prefetch


def sent_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on `device`. For a CUDA device each is collected in a thread, and copied on a stream of its
    own, while the one before it is in use; their features should lie in page-locked memory or on the device already.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)

    def sent() -> Iterator[tuple[Batch, Any]]:
        for batch in batches:
            with torch.cuda.stream(copies):
                moved = batch.to(device), copies.record_event()
            yield moved

    for batch, arrived in prefetch(sent()):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        for tensor in batch.tensors:
            tensor.record_stream(computing)  # whose use of it must end before its memory is given to the next
        yield batch
