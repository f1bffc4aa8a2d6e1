"""Write and load files of tensors; with `weights_only=True` nothing in them is executed."""

import io
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core.errors import LiteMILError, did_you_mean_path
from utils.core.files import write_bytes

# What unpickling a NumPy array or scalar needs: files written by NumPy 1 name numpy.core, by NumPy 2 numpy._core.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_GLOBALS: list[Any] = [
    np.ndarray,
    np.dtype,
    *sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSUO" if code != "O"}, key=repr),
    *[(_RECONSTRUCT, f"numpy.{home}.multiarray._reconstruct") for home in ("core", "_core")],
    *[(_SCALAR, f"numpy.{home}.multiarray.scalar") for home in ("core", "_core")],
]
# What PyTorch's readers raise for a damaged file, on purpose or not.
_LOAD_FAILURES = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)


def save_tensors(path: Path, content: Any) -> None:
    write_bytes(path, tensor_bytes(content))


def tensor_bytes(content: Any) -> bytes:
    """Return what `torch.save` writes; as it is a buffer, the bytes do not depend on a file's name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_tensors(path: Path, error: type[LiteMILError], expected: str) -> Any:
    """Load a file of tensors, NumPy arrays and plain values onto the CPU; nothing in it is executed.

    Raises `error` with the file's name if it is missing, damaged, or holds anything else; the message says that
    `expected` should be in it.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"{path}: no such file; expected {expected}{did_you_mean_path(path)}")
    try:
        with torch.serialization.safe_globals(_NUMPY_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _LOAD_FAILURES as failure:
        raise error(
            f"{path}: not loadable as {expected}: {_load_failure(failure)}; nothing in it was executed"
        ) from failure


def _load_failure(failure: Exception) -> str:
    """Return why loading failed, in a few words; PyTorch's message is long and advises to load the file unsafely."""
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    forbidden = re.search(r"GLOBAL ([\w.]+)", str(failure))
    if forbidden:
        return f"it holds {forbidden[1]}, which is neither tensor, array nor plain value"
    return "damaged, or of another format"
