"""Run training jobs on an engine, and show how far they are."""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from utils.core.engine import Engine, WorkerDied
from utils.core.errors import EngineError, plural
from utils.core.runtime import log, progress_bar
from utils.learning.epoch_count import Epochs
from utils.learning.jobs import Trainer, TrainingJob


def train_jobs(trainer: Trainer, jobs: Sequence[TrainingJob], engine: Engine, remedy: str) -> None:
    """Train those jobs that are not kept yet. Raise EngineError, with the `remedy`, for jobs whose workers died."""
    ended = {job.name: count for job in jobs if (count := trainer.epochs_of_kept(job)) is not None}
    epochs = Epochs({job.name: job.epochs for job in jobs}, ended)
    name = "Refitting" if jobs and jobs[0].inner == 0 else "Training"
    with progress_bar(name, epochs.expected, unit="epoch", initial=epochs.count) as bar:
        display = _Display(bar, epochs, [])
        engine.run(trainer, [job for job in jobs if job.name not in ended], display)
    if display.given_up:
        first, *rest = display.given_up
        others = f" (and {plural(len(rest), 'other training')})" if rest else ""
        raise EngineError(f"{first}{others}; {remedy} (what is finished is kept)")


class _Display:
    """Shows the epochs of jobs as they report them; `given_up` are the jobs that no worker survived."""

    def __init__(self, bar: tqdm, epochs: Epochs, given_up: list[str]) -> None:
        self.bar, self.epochs, self.given_up = bar, epochs, given_up

    def __call__(self, job: TrainingJob, message: dict[str, Any] | WorkerDied | None) -> None:
        """Take a job's row of history, None for its end, or the news that its worker died."""
        epochs, steps, score = self.epochs, 0, {}
        if isinstance(message, WorkerDied):
            steps = -self._restart(job, message)
        elif message is None:  # it has ended, perhaps before its last epoch
            epochs.end(job.name)
        else:
            epochs.step(job.name)
            value = message.get(job.monitor.replace("slide_", "val_"))
            steps, score = 1, {job.monitor: "-" if value is None else f"{value:.3f}"}
        self.bar.total = epochs.expected
        self.bar.set_postfix({"trainings": f"{len(epochs.ended)}/{len(epochs.most)}"} | score, refresh=False)
        self.bar.update(steps)

    def _restart(self, job: TrainingJob, message: WorkerDied) -> int:
        """Return how many epochs a job that is trained again loses."""
        if message.for_good:
            self.given_up.append(f"{job.name}: {message}")
        again = f"trained again, {message.workers_left} at a time" if message.workers_left else "trained again"
        log.warning("%s: %s; it is %s", job.name, message, "given up" if message.for_good else again)
        return self.epochs.restart(job.name)
