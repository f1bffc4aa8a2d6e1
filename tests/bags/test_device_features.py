"""Features that stay on a device: whether they fit, and that they are the source's."""

import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests.cohort import write_cohort
from utils.bags import device_features, device_stream
from utils.bags.chunks import collate, cut_chunks, cuts_on
from utils.bags.dataset import on_device
from utils.bags.device_features import DeviceFeatures, fits_on_device, survives_float16
from utils.bags.device_stream import batches_ahead, slides_ahead
from utils.mil_dataset import MILDataset

GB = 10**9


@pytest.fixture(scope="module", params=["float16", "float32"])
def cohort(request, tmp_path_factory) -> MILDataset:
    folder = tmp_path_factory.mktemp(request.param)
    return MILDataset(*write_cohort(folder, patients_per_class=2, dtype=request.param), chunk_size=20)


@pytest.fixture
def memory(monkeypatch):
    """Say how much memory of the device is free."""

    def free(count: int | None) -> None:
        monkeypatch.setattr(device_features, "free_memory", lambda _: count)

    return free


@pytest.mark.parametrize(
    ("total", "free", "processes", "fits"),
    [
        (18 * GB, 80 * GB, 1, True),  # 875 slides of 10,000 patches on a card of 80 GB
        (18 * GB, 24 * GB, 1, False),
        (8 * GB, 24 * GB, 1, True),
        (8 * GB + 1, 24 * GB, 1, False),
        (8 * GB, 80 * GB, 4, False),
        (6 * GB, 80 * GB, 4, True),
        (1, None, 1, False),
    ],
)
def test_a_third_of_the_free_memory_is_for_features(total, free, processes, fits):
    assert fits_on_device(total, free, processes) == fits


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_float16_holds(dtype):
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert survives_float16(features)


@pytest.mark.parametrize("value", [1e5, -7e4, float("inf"), float("nan")])
def test_what_float16_does_not_hold(value):
    features = torch.ones(5, 3)
    features[2, 1] = value
    assert not survives_float16(features)


@pytest.mark.parametrize("scale", [1e-6, 1e-30])
def test_a_feature_that_would_vanish_beside_others(scale):
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    features[:, 3] *= scale
    assert not survives_float16(features)


@pytest.mark.parametrize("is_exact", [False, True])
def test_features_are_those_of_the_source(cohort, device, is_exact):
    kept = on_device(cohort, device, is_exact=is_exact)
    for slide in (0, 3, 0):
        found, stored = kept.features(slide), cohort.features(slide)
        assert found.device.type == device.type
        assert found.dtype == (stored.dtype if is_exact else torch.float16)
        assert torch.equal(found.cpu(), stored.to(found.dtype))


def test_the_source_is_read_once(cohort, device):
    reads = []

    def source(slide):
        reads.append(slide)
        return cohort.features(slide)

    kept = DeviceFeatures(source, cohort.info, device)
    for _ in range(2):
        for slide in (1, 0):
            kept(slide)
    assert reads == [1, 0]


def test_a_slide_that_float16_does_not_hold_comes_from_the_source(device):
    slides = [torch.randn(4, 2), torch.full((3, 2), 1e6)]
    info = [device_features.BagInfo(len(slide), 2, np.dtype("float32"), None) for slide in slides]
    kept = DeviceFeatures(slides.__getitem__, info, device)
    assert kept(0).dtype is torch.float16
    assert kept(1) is slides[1]
    assert kept(1) is slides[1]


def test_what_does_not_fit_comes_from_the_source_and_is_said(cohort, device, memory, caplog):
    kept = on_device(cohort, device, processes=2)._features
    memory(6 * kept.total - 1)
    with caplog.at_level("INFO", "litemil"):
        assert torch.equal(kept(0), cohort.features(0))
    assert "are not kept there, but sent in every epoch" in caplog.text
    assert "which 2 processes share" in caplog.text
    assert kept(0).device.type == "cpu"


def test_what_just_fits_is_kept(cohort, device, memory):
    kept = on_device(cohort, device, processes=2)._features
    memory(6 * kept.total)
    assert kept(0) is not cohort.features(0)
    assert kept(0).device.type == device.type


def test_memory_that_is_gone_is_no_error(cohort, device, monkeypatch, caplog):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    kept = on_device(cohort, device)._features
    monkeypatch.setattr(device_features.torch, "empty", full)
    with caplog.at_level("INFO", "litemil"):
        assert torch.equal(kept(0), cohort.features(0))
    assert "has no memory left" in caplog.text


def test_a_copy_in_another_process_begins_empty(cohort, device):
    kept = on_device(cohort, device, processes=3, is_exact=True)._features
    kept(0)
    copy = pickle.loads(pickle.dumps(kept))  # noqa: S301 - made here
    assert not copy._on_device
    assert (copy.device, copy.processes, copy.is_exact) == (device, 3, True)
    assert torch.equal(copy(1).cpu(), cohort.features(1))


def test_a_cohort_that_is_to_be_read_from_files_is(cohort, device):
    csv, features = cohort.features_dir.parent / "labels.csv", cohort.features_dir
    uncached = MILDataset(csv, features, chunk_size=20, cache="off")
    assert on_device(uncached, device) is uncached


def test_batches_are_the_same_wherever_features_are(cohort, device):
    kept = on_device(cohort, device, is_exact=True)
    slides = np.arange(len(cohort))
    for _ in range(2):
        found = list(batches_ahead(kept.batches(slides, 3, seed=5, pin_memory=device.type == "cuda"), device))
        expected = list(cohort.batches(slides, 3, seed=5))
        assert len(found) == len(expected) > 3
        for one, other in zip(found, expected, strict=True):
            pairs = zip(one.tensors, other.tensors, strict=True)
            assert all(torch.equal(values.cpu(), wanted) for values, wanted in pairs)


def test_a_stream_sends_what_lies_in_memory(cohort, device):
    slides = np.arange(len(cohort))
    batches = cohort.batches(slides, 3, seed=5, pin_memory=device.type == "cuda")
    for one, other in zip(batches_ahead(batches, device), cohort.batches(slides, 3, seed=5), strict=True):
        assert {tensor.device.type for tensor in one.tensors} == {device.type}
        pairs = zip(one.tensors, other.tensors, strict=True)
        assert all(torch.equal(values.cpu(), wanted) for values, wanted in pairs)


class FakeStream:
    """Stands for a stream of a card: keeps what it was told."""

    device = "cuda:1"

    def __init__(self, *_):
        self.events = []

    def record_event(self):
        self.events.append(f"copied {len(self.events)}")
        return self.events[-1]

    def wait_event(self, event):
        self.events.append(event)


def test_what_is_computed_waits_for_its_own_copy(monkeypatch):
    computing, used = FakeStream(), []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used.append((tensor.item(), stream)))
    items = [torch.tensor(number) for number in range(4)]
    ahead = device_stream._ahead(items, torch.device("cuda"), lambda item: item + 10, lambda item: (item,))
    for number, item in enumerate(ahead):
        assert item.item() == number + 10
        assert computing.events[-1] == f"copied {number}"
        assert used[-1] == (number + 10, computing)
    assert len(used) == 4


@pytest.mark.parametrize("is_kept", [True, False])
def test_slides_are_sent_as_they_are(cohort, device, is_kept):
    data = on_device(cohort, device, is_exact=True) if is_kept else cohort
    slides = slides_ahead(map(data.features, range(len(cohort))), device)
    for slide, found in enumerate(slides):
        assert found.device.type == device.type
        assert torch.equal(found.cpu(), cohort.features(slide))


def test_the_inventory_is_of_the_files(cohort, device):
    kept = on_device(cohort, device)
    assert [record.sha256 for record in kept.inventory({})] == [record.sha256 for record in cohort.inventory({})]


def test_cuts_are_sent_together():
    cuts = cut_chunks(50, 20, rng=np.random.default_rng(0))
    sent = cuts_on(cuts, torch.device("meta"))
    assert [len(cut) for cut in sent] == [len(cut) for cut in cuts]
    assert {cut.device.type for cut in sent} == {"meta"}
    ranges = cut_chunks(50, 20, sequential=True)
    assert cuts_on(ranges, torch.device("meta")) is ranges


def test_a_batch_of_features_on_a_device_stays_there(cohort):
    batch = collate(on_device(cohort, torch.device("cpu"))._chunks(0, np.random.default_rng(0), 1.0))
    assert {bag.dtype for bag in batch.bags} == {torch.float16}
