"""What the benchmarks print: a Markdown table, and the machine it was made on."""

import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path


def table(heading: str, rows: list[list[str]]) -> str:
    """Rows of cells under a heading such as "model | time | memory"; all but the first column are right-aligned."""
    lines = [heading.split(" | "), ["---"] + ["---:"] * heading.count(" | "), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def processor() -> str:
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return cpu[1] if cpu else platform.processor() or platform.machine()


def versions() -> list[str]:
    return [f"Python {platform.python_version()}", f"PyTorch {version('torch')}"]
