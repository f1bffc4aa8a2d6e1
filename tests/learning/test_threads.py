"""On how many threads a training computes."""

import logging

import pytest
import torch

from utils.bags.chunks import Batch
from utils.core import runtime
from utils.core.engine import threads
from utils.core.files import read_json, write_json
from utils.learning import threads as chooser
from utils.learning.threads import ThreadChoice, choose_threads, fastest, thread_counts, trial_bags
from utils.nested_cv import NestedCrossValidation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")


def batch(*patches: int, width: int = 16) -> Batch:
    each = torch.zeros(len(patches))
    return Batch(tuple(torch.ones(count, width) for count in patches), each.long(), each, each.long())


def choose(make_model, batch, most: int = 2, device: torch.device = CPU, may_try: bool = True) -> ThreadChoice:
    return choose_threads(make_model, lambda: batch, most, device, may_try=may_try)


@pytest.fixture
def large(monkeypatch):
    """A batch that is large enough to be tried."""
    monkeypatch.setattr(chooser, "SMALL_STEP", 100)
    return batch(40, 50)


def test_small_steps_take_one_thread_without_a_trial(make_model, monkeypatch):
    monkeypatch.setattr(chooser, "step_seconds", None)
    assert choose(make_model, batch(900, 100), most=64) == ThreadChoice(1, "its steps are small")
    assert chooser.SMALL_STEP == 1024 * 1024, "a thousand patches of 1024 features"


def test_large_steps_are_tried_and_the_choice_is_written_down(make_model, large, monkeypatch):
    monkeypatch.setattr(chooser, "step_seconds", lambda *_: {1: 0.2, 2: 0.1})
    choice = choose(make_model, large)
    assert str(choice) == (
        "each training computes on 2 threads: fastest in a trial (a step of 200 ms on 1, 100 ms on 2); "
        "OMP_NUM_THREADS decides otherwise"
    )
    assert choice.as_dict()["threads"] == 2
    assert choice.as_dict()["threads_tried"] == {"1": 0.2, "2": 0.1}


def test_a_trial_measures_each_number_of_threads(make_model, large):
    before = torch.get_num_threads()
    choice = choose(make_model, large)
    assert set(choice.seconds) == {1, 2}
    assert all(seconds > 0 for seconds in choice.seconds.values())
    assert torch.get_num_threads() == before


def test_what_the_user_says_is_not_tried(make_model, large, monkeypatch):
    monkeypatch.setattr(chooser, "step_seconds", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose(make_model, large, most=3) == ThreadChoice(3, "OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose(make_model, large, most=1).threads == 1
    assert choose(make_model, large, most=4, may_try=False).threads == 4, "other machines compute"
    assert choose(make_model, large, most=4, device=torch.device("cuda")).threads == 4


def test_one_slow_turn_decides_nothing(make_model, monkeypatch):
    """A step that another process holds up strikes one turn of one number; the median does not hear of it."""
    clock = {"now": 0.0, "turn": 0}

    class Model(torch.nn.Module):
        def forward_bags(self, bags):
            clock["turn"] += 1
            clock["now"] += 5.0 if clock["turn"] == 8 else 1.0 / torch.get_num_threads()
            return torch.zeros(1, requires_grad=True), {}

    monkeypatch.setattr(chooser.time, "perf_counter", lambda: clock["now"])
    with threads(1):
        found = chooser.step_seconds(Model(), [torch.ones(3, 4)], [1, 2])
    assert found == pytest.approx({1: 1.0, 2: 0.5})


@pytest.mark.parametrize(
    ("seconds", "count"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.4}, 4),
        ({1: 1.0, 2: 0.95}, 1),  # not worth it
        ({1: 1.0, 2: 2.0}, 1),
        ({1: 1.0, 2: 1.5, 4: 0.5}, 4),
        ({1: 1.0, 2: 0.5, 4: 0.48, 8: 0.47}, 2),
    ],
)
def test_more_threads_are_taken_where_they_are_clearly_faster(seconds, count):
    assert fastest(seconds) == count


def test_doubling_numbers_are_tried_up_to_the_most():
    assert [thread_counts(most) for most in (2, 3, 4, 6, 64)] == [
        [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32, 64],
    ]  # fmt: skip


def test_a_trial_takes_a_few_patches_only():
    assert [len(bag) for bag in trial_bags(batch(1000, 2000, 3000, 4000, width=1).bags)] == [1000, 2000, 1096]
    assert [len(bag) for bag in trial_bags(batch(50_000, width=1).bags)] == [4096]
    assert [len(bag) for bag in trial_bags(batch(5, 6, width=1).bags)] == [5, 6]


@pytest.mark.usefixtures("no_figures")
def test_a_run_says_and_keeps_what_was_chosen(dataset, make_model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runtime.log, "propagate", True)
    caplog.set_level(logging.INFO, logger=runtime.log.name)
    monkeypatch.setattr(runtime, "processors", lambda: 2)
    monkeypatch.setattr("utils.core.engine.processors", lambda: 2)

    def run() -> dict:
        caplog.clear()
        names = ("n_outer", "n_inner", "epochs", "patience")
        settings = dict(zip(names, (2, 2, 1, 1), strict=True))
        cv = NestedCrossValidation(make_model, dataset, dataset.class_names, tmp_path / "run", **settings)
        with threads(2):
            cv.run()
        return read_json(tmp_path / "run" / "run.json")

    record = run()
    assert (record["threads"], record["threads_because"]) == (1, "its steps are small")
    assert "each training computes on 1 thread: its steps are small" in caplog.text
    # The run that is begun again keeps its number, whatever would be chosen now.
    content = read_json(tmp_path / "run" / "run.json") | {"finished": False}
    write_json(tmp_path / "run" / "run.json", content)
    monkeypatch.setattr(chooser, "SMALL_STEP", 1)
    monkeypatch.setattr(chooser, "step_seconds", None)
    assert run()["threads"] == 1
    assert "each training goes on with 1 thread, as the run began" in caplog.text
    assert "its steps are small" not in caplog.text
