"""Digest a slide's features, to recognise the same features under another name or in another file."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from utils.bags.store import StoredFeatures

_ROWS = 4096  # read at a time, so that a slide's features need not fit in memory twice


class ContentDigest:
    """The SHA-256 of features, of their type, shape and values, whose rows are added piece by piece."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self._content = hashlib.sha256(f"{dtype} {tuple(shape)}\n".encode())

    def add(self, rows: Tensor) -> None:
        for block in rows.split(_ROWS):
            self._content.update(block.contiguous().numpy().data)

    def hexdigest(self) -> str:
        return self._content.hexdigest()


def features_digest(features: Tensor) -> str:
    """Return the digest of `features (N, D)`."""
    content = ContentDigest(features.dtype, features.shape)
    content.add(features)
    return content.hexdigest()


class DigestedFeatures(StoredFeatures):
    """Stored features whose digest is computed while they are read for something else."""

    def __init__(self, features: StoredFeatures) -> None:
        super().__init__(features.path, features.feat_type, features.info)
        self._digest: str | None = None

    def whole(self) -> Tensor:
        features = super().whole()
        if self._digest is None:
            self._digest = features_digest(features)
        return features

    def blocks(self, rows_each: int) -> Iterator[Tensor]:
        content: ContentDigest | None = None
        for block in super().blocks(rows_each):
            if self._digest is None:
                content = content or ContentDigest(block.dtype, self.shape)
                content.add(block)
            yield block
        if content is not None:
            self._digest = content.hexdigest()

    def digest(self) -> str:
        """Return the digest; read the features if they have not been read to their end."""
        if self._digest is None:
            for _ in self.blocks(_ROWS):
                pass
        return str(self._digest)
