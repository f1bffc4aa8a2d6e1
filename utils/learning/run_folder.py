"""A training run's output folder: which run owns it, whether it is finished, and moving another run's results aside."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from utils.core.errors import ConfigError
from utils.core.files import read_json, write_json
from utils.core.runtime import log


class RunFolder:
    """The folder of a run. Two commands with the same `identity` are the same run, so its finished trainings are kept.

    `run.json` holds the identity, and whether the run is finished; `resume/` holds the trainings of an unfinished run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.resume = path, path / "resume"
        self.identity: Mapping[str, Any] = {}
        self.is_new = False  # after `take`: whether this session began the run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder. Raises ConfigError if another one holds it."""
        folder = self.path.resolve()
        # Beside the folder, which may be moved aside.
        lock_file = folder.with_name(f".{folder.name}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock_file.touch()  # its error names the cause; that of the lock would not
            lock = filelock.FileLock(lock_file)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(
                f"{self.path}: another process is training into this folder; wait for it, or give another --output_dir"
            ) from None
        except NotImplementedError:  # some network file systems
            log.info("%s: files cannot be locked here; let no other process train into this folder", self.path)
            yield
            return
        except OSError as failure:
            raise ConfigError(
                f"{self.path}: cannot be written ({failure.strerror}); give another --output_dir"
            ) from failure
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes it on release
                lock_file.unlink()
            lock.release()

    def record(self) -> dict[str, Any] | None:
        """Return the folder's run.json, or None. Raises ConfigError if it is not the record of a run."""
        path = self.path / "run.json"
        if not path.is_file():
            return None
        content = read_json(path)
        if not isinstance(content, dict) or "finished" not in content:
            raise ConfigError(f"{path}: not the record of a training run; give another --output_dir")
        return {"identity": {}} | content

    def take(
        self,
        identity: Mapping[str, Any],
        record: Callable[[], Mapping[str, Any]],
        details: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Take the folder for the run with this identity, and return its run.json: that of an earlier session, finished
        or not, or a new one with what `record` returns.

        Another run's folder is moved aside; a warning names the fields of the identity that differ, by their `details`
        if there are any. Raises ConfigError if the folder holds anything else.
        """
        self.identity = identity
        content = self.record()
        if content is not None:
            recorded = content["identity"]
            differing = sorted(name for name, value in identity.items() if recorded.get(name) != value)
            changed = [(details or {}).get(name, name) for name in differing]
            if not changed:
                if not content["finished"]:
                    log.info("%s: resuming; %d trainings are done", self.path, len(list(self.resume.glob("*.pt"))))
                return content
            aside = _next_free(self.path)
            self.path.rename(aside)
            log.warning("%s held another run (%s differs); moved to %s", self.path, ", ".join(changed), aside)
        elif self.path.is_dir() and any(not item.name.startswith(".") for item in self.path.iterdir()):
            raise ConfigError(f"{self.path}: not empty and not a training run; give another --output_dir")
        self.is_new = True
        return self._write(record(), finished=False)

    def finish(self, record: Mapping[str, Any]) -> None:
        self._write(record, finished=True)

    def clear_leftovers(self) -> None:
        """Remove what only an unfinished run needs, and half-written files of killed runs."""
        shutil.rmtree(self.resume, ignore_errors=True)
        for path in self.path.glob(".*.part"):
            path.unlink(missing_ok=True)

    def _write(self, record: Mapping[str, Any], *, finished: bool) -> dict[str, Any]:
        content = {"identity": self.identity, **record, "finished": finished}
        write_json(self.path / "run.json", content)
        return content


def _next_free(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside
