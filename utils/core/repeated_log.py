"""Log lines that repeat for many files: logged for the first, then once for all others with their number."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.core.errors import first_few
from utils.core.runtime import log

_NAMED = 3


class _Alike(logging.Filter):
    """Lets the first of several lines through that differ only in the file they begin with, and counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[tuple[int, str], dict[str, None]] = {}  # by level and text, in order

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or not (record.args and str(record.msg).startswith("%s: ")):
            return True
        subject = str(record.args[0])  # type: ignore[index]
        files = self.files.setdefault((record.levelno, record.getMessage().removeprefix(f"{subject}: ")), {})
        is_first = not files
        files.setdefault(subject)
        return is_first


@contextmanager
def log_repeats_once() -> Iterator[None]:
    """Within the block, log warnings and errors that differ only in their file once; at its end, log how many more
    files they hold for, and the first few names.
    """
    alike = _Alike()
    log.addFilter(alike)
    try:
        yield
    finally:
        log.removeFilter(alike)
        for (level, message), files in alike.files.items():
            more = list(files)[1:]
            if len(more) == 1:
                log.log(level, "%s: %s", *more, message)
            elif more:
                names = first_few([Path(file).name for file in more], _NAMED)
                log.log(level, "the same of %d more (%s): %s", len(more), names, message)
