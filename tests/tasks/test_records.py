import pytest

from utils.tasks.classification import Classification
from utils.tasks.records import task_of


def test_a_record_names_its_task():
    task = Classification(("benign", "in situ", "invasive"))
    assert task_of(task.record) == task
    assert task_of({"class_names": list(task.outputs), "pooled": {}, "n_slides": 3}) == task


def test_a_record_of_one_class_is_refused():
    with pytest.raises(ValueError, match="a classifier needs two different ones"):
        task_of({"class_names": ["benign"]})
