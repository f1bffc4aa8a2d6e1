"""Check an installation, and print a report to paste into a question.

uv run python -m utils.doctor
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Our own modules are imported inside the checks, as one of them may be what cannot be imported.

_OK, _NOTE, _BAD = "ok", "note", "BAD"
_LEAST_DISK, _LEAST_MEMORY = 20e9, 4e9  # bytes: features of some hundred slides; a backbone and its patches
TEST_SLIDE = Path(__file__).resolve().parents[1] / "testSlides" / "testSlide.svs"
_PACKAGES = ("numpy", "h5py", "openslide", "imagecodecs", "tifffile", "timm", "sklearn", "scipy",
             "pandas", "matplotlib", "PIL", "tqdm", "huggingface_hub")  # fmt: skip
_SECONDS = 10  # to wait for a program or the network


@dataclass(frozen=True)
class Finding:
    """The result of one check: `state` is "ok", "note" (works, with a limitation) or "BAD"; `remedy` is the way out."""

    subject: str
    state: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:5}{self.subject:12}{self.text}"
        return f"{line}\n{'':17}-> {self.remedy}" if self.remedy else line


def examine() -> list[Finding]:
    """Run all checks; if one fails to import something, the others still run."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "litemil": _litemil,
        "processors": _processors,
        "threads": _threads,
        "torch": _torch,
        "device": _device,
        "packages": _packages,
        "slides": _slides,
        "memory": _memory,
        "disk": _disk,
        "hub": _hub,
    }
    findings = []
    for subject, check in checks.items():
        try:
            findings.append(check())
        except Exception as failure:  # noqa: BLE001 - a broken package raises anything, and the report is for that
            remedy = "run `uv sync`; if it stays, ask with this report"
            findings.append(Finding(subject, _BAD, f"{type(failure).__name__}: {failure}", remedy))
    return findings


def as_text(findings: list[Finding]) -> str:
    """Return the report."""
    bad = sum(finding.state == _BAD for finding in findings)
    fine = "Everything that LiteMIL needs is there. Next:\n\n  uv run train.py --mil LiteMIL --dataset demo"
    verdict = f"{bad} of {len(findings)} checks failed" if bad else fine
    return "\n".join([*map(str, findings), "", verdict])


def _python() -> Finding:
    return Finding("python", _OK, f"{platform.python_version()} on {platform.platform()}")


def _litemil() -> Finding:
    from utils.core.runtime import git_commit, versions

    commit = git_commit()
    return Finding("litemil", _OK, versions()["litemil"] + (f", commit {commit[:12]}" if commit else ""))


def _torch() -> Finding:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    product = torch.ones(64, 64) @ torch.ones(64, 64)
    if product[0, 0] != 64:
        return Finding("torch", _BAD, f"{torch.__version__} multiplies wrongly", "run `uv sync --reinstall`")
    return Finding("torch", _OK, f"{torch.__version__}, {built}")


def _device() -> Finding:
    import torch

    with warnings.catch_warnings(record=True) as caught:  # they say why there is no CUDA
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    driver = _driver()
    if has_cuda:
        for index in range(torch.cuda.device_count()):
            torch.ones(8, 8, device=f"cuda:{index}").sum().item()  # a driver that is too old fails here
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus)
        return Finding("device", _OK, f"{names}; driver {driver or 'unknown'}")
    if driver:
        reason = " ".join(str(caught[0].message).split())[:160] if caught else "PyTorch sees no CUDA device"
        remedy = "update the driver, or install a PyTorch for it (README, Troubleshooting); until then the CPU computes"
        return Finding("device", _NOTE, f"GPU driver {driver}, but {reason}", remedy)
    if torch.backends.mps.is_available():
        return Finding("device", _OK, "Apple GPU (mps)")
    return Finding("device", _NOTE, "no GPU: the CPU computes, large backbones slowly")


def _driver() -> str | None:
    """Return the NVIDIA driver's version; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return None
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def _packages() -> Finding:
    versions = [f"{name} {getattr(importlib.import_module(name), '__version__', '')}".strip() for name in _PACKAGES]
    return Finding("packages", _OK, ", ".join(versions))


def _slides() -> Finding:
    from utils.core.errors import SlideError
    from utils.slides.open_slides import open_slide

    library = f"OpenSlide {importlib.import_module('openslide').__library_version__}"
    if not TEST_SLIDE.exists():
        remedy = "not a clone of the repository? then look at a slide of yours: extractFeatures.py --dry_run"
        return Finding("slides", _NOTE, f"{library}; the test slide is not there", remedy)
    try:
        with open_slide(TEST_SLIDE) as slide:
            slide.read_region(0, 0, 0, 64, 64)
            return Finding("slides", _OK, f"{library} reads the test slide ({slide.width} x {slide.height} px)")
    except SlideError as failure:
        return Finding(
            "slides",
            _BAD,
            f"{library}: {failure}".replace(str(TEST_SLIDE.parent), "testSlides"),
            "run `uv sync --reinstall`",
        )


def _processors() -> Finding:
    from utils.core.runtime import processors, visible_processors

    usable, visible = processors(), visible_processors()
    words = f"{usable}"
    if usable < visible:
        words += f" of {visible}: a limit of the batch system or container"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    words += f"; load {load:.1f}" if load else ""
    if load < usable:
        return Finding("processors", _OK, words)
    remedy = "other processes compete: what is shared takes longer; OMP_NUM_THREADS says how many threads to use"
    return Finding("processors", _NOTE, f"{words}, as much as there is", remedy)


def _threads() -> Finding:
    """Check the threads, before PyTorch is imported and reads the environment."""
    from utils.core.runtime import WAITING, prepare_threads, threads_are_given, threads_wait_asleep

    prepare_threads()

    import torch

    count = torch.get_num_threads()
    source = "as OMP_NUM_THREADS says" if threads_are_given() else "at most, training fewer where that is faster"
    if threads_wait_asleep():
        return Finding("threads", _OK, f"{count}, {source}; those that wait sleep")
    names = ", ".join(name for name in WAITING if name in os.environ)
    remedy = f"on a busy machine they slow each other down: unset {names}"
    return Finding("threads", _NOTE, f"{count}, {source}; those that wait spin", remedy)


def _memory() -> Finding:
    from utils.core.runtime import available_memory, file_size

    free = available_memory()
    if free is None:
        return Finding("memory", _NOTE, "the system does not tell how much is free")
    remedy = "give smaller --batch_size in extraction and --cache off in training" if free < _LEAST_MEMORY else ""
    return Finding("memory", _NOTE if remedy else _OK, f"{file_size(free)} free", remedy)


def _disk() -> Finding:
    from utils.core.runtime import file_size

    free = shutil.disk_usage(Path.cwd()).free
    remedy = "features take 10 to 100 MB a slide: --output_dir on another disk" if free < _LEAST_DISK else ""
    return Finding("disk", _NOTE if remedy else _OK, f"{file_size(free)} free here", remedy)


def _hub() -> Finding:
    from utils.features.weights import hub_access

    reached, text = hub_access(_SECONDS)
    remedy = "" if reached else "backbones can come from local files: --weights FILE (README, Troubleshooting)"
    return Finding("hub", _OK if reached else _NOTE, text, remedy)


def main() -> None:
    """Print the report; exit with code 1 if a check failed."""
    findings = examine()
    print(as_text(findings))
    if any(finding.state == _BAD for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from utils.core import cli

        cli.parse(str(__doc__), {})  # --help, --version; there is no more to say
    main()
