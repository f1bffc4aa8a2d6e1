"""Files of tensors: written whole, and loaded with `weights_only=True`, which executes nothing of what they hold."""

import io
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core.errors import LiteMILError
from utils.core.files import write_bytes

# What a pickled NumPy array or scalar needs to come back. Both homes of NumPy's reconstructors are named: files written
# by NumPy 1 say numpy.core, files written by NumPy 2 say numpy._core.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_GLOBALS: list[Any] = [
    np.ndarray,
    np.dtype,
    *sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSUO" if code != "O"}, key=repr),
    *[(_RECONSTRUCT, f"numpy.{home}.multiarray._reconstruct") for home in ("core", "_core")],
    *[(_SCALAR, f"numpy.{home}.multiarray.scalar") for home in ("core", "_core")],
]
# What PyTorch's readers stumble over in a damaged file, besides what they raise on purpose.
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
    """`torch.save` into a buffer: the bytes depend on the content alone, not on a file's name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_tensors(path: Path, error: type[LiteMILError], expected: str) -> Any:
    """Load a file of tensors, NumPy arrays and plain values onto the CPU; nothing it contains is executed.

    Raises `error` naming the file when it is missing, damaged, or holds anything else. `expected` says in the message
    what the file should have been.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"{path}: no such file; expected {expected}")
    try:
        with torch.serialization.safe_globals(_NUMPY_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _LOAD_FAILURES as failure:
        raise error(
            f"{path}: not loadable as {expected}: {_load_failure(failure)}; nothing in it was executed"
        ) from failure


def _load_failure(failure: Exception) -> str:
    """Why, in a few words: PyTorch's own message is long, and advises to load the file unsafely."""
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    forbidden = re.search(r"GLOBAL ([\w.]+)", str(failure))
    if forbidden:
        return f"it holds {forbidden[1]}, which is neither tensor, array nor plain value"
    return "damaged, or of another format"
