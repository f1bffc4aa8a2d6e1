"""Read the labels of single patches (`inst_labels`, as torchmil names them)."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from utils.bags.formats import as_array, open_h5
from utils.bags.store import is_tensor_file, peek_bag
from utils.core.errors import FeatureFileError
from utils.core.tensor_files import load_tensors

NAME = "inst_labels"


def read_instance_labels(path: Path, feat_type: str = "features") -> NDArray[np.int64]:
    """Return the labels `(N,)` of a feature file's patches: its `inst_labels`, or those in the file of the same name in
    `inst_labels/`, a folder beside its own. Raises FeatureFileError if there are none, or not one for each patch.
    """
    labels, source = _own(path), path
    if labels is None:
        source = path.absolute().parent.parent / NAME / path.name
        labels = _own(source) if source.is_file() else None
    if labels is None:
        raise FeatureFileError(f"{path}: no {NAME} in it, nor a file {source}; annotate areas of the slide instead")
    count = peek_bag(path, feat_type).num_instances
    whole = labels.reshape(-1) if labels.size == max(labels.shape, default=0) else labels
    if whole.shape != (count,):
        raise FeatureFileError(f"{source}: {NAME} of shape {labels.shape}; expected ({count},), one for each patch")
    if whole.dtype.kind not in "iufb" or not np.array_equal(whole, np.rint(whole)):
        raise FeatureFileError(f"{source}: {NAME} of type {whole.dtype}; expected whole numbers")
    return whole.astype(np.int64)


def _own(path: Path) -> np.ndarray | None:
    """Return the labels as the file holds them, or None."""
    if is_tensor_file(path):
        content: Any = load_tensors(path, FeatureFileError, "a dict of tensors")
        labels = content.get(NAME) if isinstance(content, dict) else None
        return None if labels is None else as_array(labels, path)
    with open_h5(path) as file:
        labels = file.get(NAME)
        return labels[()] if isinstance(labels, h5py.Dataset) and labels.shape is not None else None
