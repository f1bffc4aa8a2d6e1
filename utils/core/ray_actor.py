"""The worker's side of the engine on a Ray cluster: an actor, and what it is started with."""

import logging
import os
import pickle
import platform
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from utils.core.errors import EngineError, LiteMILError
from utils.core.processes import sendable
from utils.core.runtime import log, share_processors, use_threads


@dataclass(frozen=True)
class Parcel:
    """What a worker starts with: the pickled work, and settings of the driver's process."""

    work: bytes
    folder: str
    path: list[str]
    environment: dict[str, str]
    threads: int
    level: int


def cannot_begin(reason: str, folder: str) -> EngineError:
    needed = f"all nodes need this folder, {folder}, on storage that they share, and the same packages"
    return EngineError(f"--ray: a worker cannot begin ({reason}); {needed}")


class Actor:
    """A process of a Ray cluster. Its methods stream what happens: ("process", node and id), ("begun", None) as a task
    starts, ("messages", [message]), ("log", record), ("error", exception), and ("ended", [last message]).
    """

    def begin(self, parcel: Parcel) -> Iterator[tuple[str, Any]]:
        node = platform.node()
        yield "process", (node, os.getpid())
        sys.path += [folder for folder in parcel.path if folder not in sys.path]
        os.environ.update(parcel.environment)
        log.setLevel(parcel.level)
        log.propagate = False
        self.count = parcel.threads
        share_processors(self.count)
        try:
            os.chdir(parcel.folder)
            self.work = pickle.loads(parcel.work)  # noqa: S301 - written by the process that started us
        except (OSError, ImportError, AttributeError) as failure:
            yield "error", cannot_begin(f"on {node}: {failure}", parcel.folder)
        except LiteMILError as failure:
            yield "error", EngineError(f"--ray: a worker cannot begin on {node}: {failure}")
        except Exception as failure:  # noqa: BLE001 - raised again by the process that asked
            yield "error", sendable(failure)
        yield "ended", []

    def do(self, task: Any) -> Iterator[tuple[str, Any]]:
        """Do a task. The last message is sent together with the end, so that the worker cannot die between the two."""
        messages: SimpleQueue[tuple[str, Any] | None] = SimpleQueue()
        thread = threading.Thread(target=self._work_on, args=(task, messages))
        yield "begun", None
        thread.start()
        last: list[Any] = []
        while (message := messages.get()) is not None:
            if message[0] != "messages":
                yield message
                continue
            if last:
                yield "messages", last
            last = message[1]
        thread.join()
        yield "ended", last

    def _work_on(self, task: Any, messages: SimpleQueue) -> None:
        use_threads(self.count)  # it is a setting of the thread
        handler = _MessageHandler(messages)
        log.addHandler(handler)
        try:
            self.work(task, lambda message: messages.put(("messages", [message])))
        except BaseException as failure:  # noqa: BLE001 - raised again by the process that asked
            messages.put(("error", sendable(failure)))
        finally:
            log.removeHandler(handler)
            messages.put(None)


class _MessageHandler(logging.Handler):
    """Sends log records as messages."""

    def __init__(self, messages: SimpleQueue) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.put(("log", logging.makeLogRecord({**vars(record), "msg": record.getMessage(), "args": None})))
