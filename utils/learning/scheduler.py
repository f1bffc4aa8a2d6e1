"""Run training jobs on an engine, and show their progress."""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from utils.core.engine import Engine, WorkerDied
from utils.core.errors import EngineError, plural
from utils.core.runtime import log, progress_bar
from utils.learning.epoch_count import Epochs
from utils.learning.jobs import Trainer, TrainingJob


def train_jobs(trainer: Trainer, jobs: Sequence[TrainingJob], engine: Engine, remedy: str) -> None:
    """Train the jobs that are not saved yet. Raise EngineError, with the `remedy`, for jobs whose workers died."""
    ended = {job.name: count for job in jobs if (count := trainer.saved_epochs(job)) is not None}
    epochs = Epochs({job.name: job.epochs for job in jobs}, ended)
    name = "Refitting" if jobs and jobs[0].inner == 0 else "Training"
    with progress_bar(name, epochs.expected, unit="epoch", initial=epochs.count) as bar:
        display = _Display(bar, epochs, [])
        engine.run(trainer, [job for job in jobs if job.name not in ended], display)
    if display.given_up:
        first, *more = display.given_up
        and_more = f" (and {plural(len(more), 'other training')})" if more else ""
        raise EngineError(f"{first}{and_more}; {remedy} (what is finished is kept)")


class _Display:
    """Shows the epochs that jobs report; `given_up` are the jobs whose workers all died."""

    def __init__(self, bar: tqdm, epochs: Epochs, given_up: list[str]) -> None:
        self.bar, self.epochs, self.given_up = bar, epochs, given_up

    def __call__(self, job: TrainingJob, message: dict[str, Any] | WorkerDied | None) -> None:
        """Take a job's row of history, None at its end, or that its worker died."""
        epochs, steps, score = self.epochs, 0, {}
        if isinstance(message, WorkerDied):
            steps = -self._restart(job, message)
        elif message is None:
            epochs.end(job.name)
        else:
            epochs.step(job.name)
            value = message.get(job.monitor.replace("slide_", "val_"))
            steps, score = 1, {job.monitor: "-" if value is None else f"{value:.3f}"}
        self.bar.total = epochs.expected
        self.bar.set_postfix({"trainings": f"{len(epochs.ended)}/{len(epochs.most)}"} | score, refresh=False)
        self.bar.update(steps)

    def _restart(self, job: TrainingJob, message: WorkerDied) -> int:
        """Return how many epochs the job loses, which is trained again or given up."""
        if message.for_good:
            self.given_up.append(f"{job.name}: {message}")
        again = f"trained again, {message.workers_left} at a time" if message.workers_left else "trained again"
        log.warning("%s: %s; it is %s", job.name, message, "given up" if message.for_good else again)
        return self.epochs.restart(job.name)
