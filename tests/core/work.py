"""What the tests of engines have done; worker processes import it, and only what it needs."""

import os
import signal
import time
from functools import partial
from pathlib import Path

from utils.core.engine import worker_number
from utils.core.errors import ConfigError, TrainingError
from utils.core.runtime import log, processors


def fail_at_two(task: int, send) -> None:
    if task == 2:
        raise TrainingError("the loss is nan")
    time.sleep(0.05)
    send(task)


def die(task: int, send) -> None:
    os._exit(7)


def take_long(task: Path, send) -> None:
    """Sign in, then outlast every patience."""
    task.write_text(str(os.getpid()))
    time.sleep(600)


def warn(task: int, send) -> None:
    log.warning("task %d on %s", task, processors())
    send(worker_number())


def outlive(task: tuple[int, Path], send) -> None:
    """Two kills its first worker, three each of them."""
    number, folder = task
    send("begun")
    send("half")
    if number == 3 or (number == 2 and not (folder / "died").exists()):
        if number == 2:
            (folder / "died").touch()
        time.sleep(0.5)  # what was told is on its way
        os.kill(os.getpid(), signal.SIGKILL)
    send("ended")


def run_out_of_memory(task: tuple[int, Path], send) -> None:
    """Two does it once, three each time."""
    number, folder = task
    if number == 3:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")
    if number == 2 and not (folder / "ran_out").exists():
        import torch

        (folder / "ran_out").touch()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    send("ended")


def divide(task: int, send) -> None:
    send(1 / task)


class Unpacked:
    """Work that calls something where it is unpacked."""

    def __init__(self, call, argument) -> None:
        self.parts = call, (argument,)

    def __call__(self, task: int, send) -> None:
        send(task)

    def __reduce__(self):
        return self.parts


def begun_by_two_of_five(folder: Path):
    number = len(list(folder.iterdir()))
    (folder / str(number)).touch()
    if number not in (1, 4):
        os._exit(1)
    return partial(die_before, 4, number)


def begun_by_the_first(folder: Path):
    """All others die meanwhile."""
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        time.sleep(1)  # where it is is on its way
        os._exit(1)
    return partial(wait_for_files, folder, 3)


def wait_for_files(folder: Path, count: int, _: int, send) -> None:
    while len(list(folder.glob("warning_*"))) < count:
        time.sleep(0.05)
    send("done")


class Deadly:
    """A task over whose unpacking so many workers die before they have begun with it; then it is a file."""

    def __init__(self, file: Path, deaths: int) -> None:
        self.file, self.deaths = file, deaths

    def __reduce__(self):
        return die_a_few_times, (self.file, self.deaths)


def die_a_few_times(file: Path, deaths: int) -> Path:
    with file.open("a") as log_of_deaths:
        log_of_deaths.write("x")
    if file.stat().st_size <= deaths:
        os._exit(1)
    return file


def send_name(file: Path, send) -> None:
    send(file.name)


def ask(for_what: str):
    raise ConfigError(for_what)


def send_environment(name: str, send) -> None:
    send(os.environ.get(name))


def die_before(last: int, number: int, _: int, send) -> None:
    if number < last:
        os._exit(1)
    send(f"done by {number}")


def greet(_: int, send) -> None:
    log.info("hello")
    log.warning("careful")


class TwoPartError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def fail_oddly(_: int, send) -> None:
    raise TwoPartError("a", "b")


def send_oddly(_: int, send) -> None:
    send(TwoPartError("a", "b"))


def where(_: int, send) -> None:
    send(Path.cwd())
