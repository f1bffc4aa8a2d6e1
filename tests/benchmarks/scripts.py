"""The scripts of benchmarks/: imported, or run as commands."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def imported(name: str) -> ModuleType:
    """Return a script as a module, which finds its neighbours as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


def printed(name: str, *flags: str) -> str:
    """Return what a script prints."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table_cells(text: str) -> list[list[str]]:
    """Return the cells of each line of a Markdown table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
