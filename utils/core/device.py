"""The device and precision a process computes with, the seeds of its generators, and a record of them."""

import os
import platform
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from utils.core.errors import ConfigError
from utils.core.runtime import available_memory, git_commit, versions


def resolve_device(name: str) -> torch.device:
    """Return the device; `auto` takes CUDA, then MPS, then the CPU. Raise ConfigError for one that is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9]\d*))?", name):
        raise ConfigError(f"--device {name}: unknown; use auto, cpu, mps, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"--device {name}: PyTorch sees {count} CUDA devices; use --device auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: PyTorch sees no Apple GPU; use --device auto or cpu")
    return device


def amp_dtype(precision: str, device: torch.device, auto: str | None = None) -> torch.dtype | None:
    """Return what autocast computes in on this device for a `--precision`; None if it is off,
    as it is for tf32 (see `uses_tf32`).

    The precision `auto` is the one in `auto`, by default bf16 on a CUDA device that has it, else fp16; it is off on
    other devices. Raises ConfigError for a precision that the device lacks.
    """
    if precision == "fp32":
        return None
    if device.type != "cuda":
        if precision != "auto":
            raise ConfigError(f"--precision {precision}: needs a CUDA device, not {device}; give auto or fp32")
        return None
    if precision == "tf32":
        if not has_tf32(device):
            raise ConfigError("--precision tf32: this CUDA device has none; give fp16, auto or fp32")
        return None
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # emulated, it is slow
    if precision == "bf16" and not has_bf16:
        raise ConfigError("--precision bf16: this CUDA device has none; give fp16, auto or fp32")
    if precision == "auto" and auto is not None:
        precision = "fp16" if auto == "bf16" and not has_bf16 else auto
    return {"auto": torch.bfloat16 if has_bf16 else torch.float16, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
        precision
    )


def has_tf32(device: torch.device) -> bool:
    """Return whether a CUDA device can multiply in TF32, which has the range of float32 and ten bits of fraction."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


def uses_tf32(precision: str, device: torch.device) -> bool:
    """Return whether products and convolutions of float32 numbers are in TF32 on this device for a `--precision`: in
    all but fp32, where the device has it.
    """
    return device.type == "cuda" and precision != "fp32" and has_tf32(device)


def set_tf32(device: torch.device, on: bool) -> None:
    """Compute products and convolutions of float32 numbers in TF32 from now on, or in float32, if the device is a CUDA
    device. The setting is that of the whole process. PyTorch's own is TF32 for convolutions alone.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = on
        torch.backends.cudnn.allow_tf32 = on


@contextmanager
def repeatable(device: torch.device, on: bool) -> Iterator[None]:
    """Let a CUDA device use only algorithms that give the same bytes each time, within the context, if `on`."""
    if not on or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS's results may differ
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - other libraries draw from the global generator
    torch.manual_seed(seed)


def run_metadata(device: torch.device) -> dict[str, Any]:
    """Return what a reader of results may want to know about the process that made them."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "argv": sys.argv,
        "versions": versions(),
        "git_commit": git_commit(),
        "platform": platform.platform(),
        "device": str(device),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of free memory of a CUDA device, or of the machine; None if the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Return the most bytes taken by this process, by any one of its child processes that have ended, and by its
    tensors on a CUDA device; None if the system does not say.
    """
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"process": _peak("RUSAGE_SELF"), "worker": _peak("RUSAGE_CHILDREN"), "device": on_device}


def _peak(processes: str) -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(getattr(resource, processes)).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
