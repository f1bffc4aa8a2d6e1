"""What a progress bar expects of trainings that may stop early."""

from utils.learning.epoch_count import Epochs


def test_while_none_has_ended_each_may_take_all_its_epochs():
    epochs = Epochs({"a": 100, "b": 50}, {})
    assert (epochs.count, epochs.expected) == (0, 150)
    epochs.step("a")
    assert (epochs.count, epochs.expected) == (1, 150)


def test_those_that_ended_tell_of_those_to_come():
    epochs = Epochs({"a": 100, "b": 100, "c": 50}, {})
    for _ in range(40):
        epochs.step("a")
    epochs.end("a")
    assert epochs.expected == 40 + 40 + 20
    for _ in range(45):
        epochs.step("b")
    assert epochs.expected == 40 + 46 + 20, "one that takes longer takes one more"
    epochs.end("b")
    assert epochs.expected == 40 + 45 + 21  # 42.5% of 50


def test_none_takes_more_than_its_most():
    epochs = Epochs({"a": 10, "b": 3}, {"a": 10})
    for _ in range(3):
        epochs.step("b")
    assert epochs.expected == 13


def test_an_earlier_session_counts_and_a_lost_training_begins_anew():
    epochs = Epochs({"a": 100, "b": 100}, {"a": 30})
    assert (epochs.count, epochs.expected) == (30, 60)
    epochs.step("b")
    assert epochs.restart("b") == 1
    assert (epochs.count, epochs.expected) == (30, 60)
    epochs.end("b")
    assert epochs.expected == epochs.count
