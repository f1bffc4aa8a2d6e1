"""The folder of a training run: whose it is, what of it is finished, and what another run left there."""

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
    """A run's `identity` is what makes two runs the same: with it unchanged, finished parts are kept.

    `run.json` holds it, and whether the run is finished; `resume/` what an unfinished run needs to go on.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.resume = path, path / "resume"
        self.identity: Mapping[str, Any] = {}
        self.is_new = False  # after `take`: whether this session began the run

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out meanwhile. Raises ConfigError when one is in already."""
        place = self.path.resolve()
        # Beside the folder, which may have to move aside.
        lock_file = place.with_name(f".{place.name}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock_file.touch()  # says what is wrong where it cannot be; taking the lock would not
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
            with suppress(OSError):  # Windows removes it when it is let go
                lock_file.unlink()
            lock.release()

    def record(self) -> dict[str, Any] | None:
        """Return the folder's run.json, None where there is none. Raises ConfigError for one that is no run's."""
        path = self.path / "run.json"
        if not path.is_file():
            return None
        found = read_json(path)
        if not isinstance(found, dict) or "finished" not in found:
            raise ConfigError(f"{path}: not the record of a training run; give another --output_dir")
        return {"identity": {}} | found

    def take(
        self,
        identity: Mapping[str, Any],
        record: Callable[[], Mapping[str, Any]],
        details: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Make the folder that of the run with this identity, and return its run.json: that of an earlier session,
        finished or not, or else a new one with what `record` returns. Another run's folder is moved aside, said with
        the parts of the identity that differ; `details` tells more of a part than its name. Raises ConfigError for a
        folder that holds something else.
        """
        self.identity = identity
        found = self.record()
        if found is not None:
            known = found["identity"]
            differing = sorted(name for name, value in identity.items() if known.get(name) != value)
            changed = [(details or {}).get(name, name) for name in differing]
            if not changed:
                if not found["finished"]:
                    done = len(list(self.resume.glob("*.pt")))
                    log.info("%s: resuming; %d trainings are done", self.path, done)
                return found
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
        """Remove what only an unfinished run needs, and the half-written files of killed ones."""
        shutil.rmtree(self.resume, ignore_errors=True)
        for part in self.path.glob(".*.part"):
            part.unlink(missing_ok=True)

    def _write(self, record: Mapping[str, Any], *, finished: bool) -> dict[str, Any]:
        content = {"identity": self.identity, **record, "finished": finished}
        write_json(self.path / "run.json", content)
        return content


def _next_free(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside
