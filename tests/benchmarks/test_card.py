"""What the benchmarks do on a card, tried in small on a CPU, where a clock stands for the card's events."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.benchmarks.scripts import BENCHMARKS, imported, table_cells
from utils.features.backbones import Backbone
from utils.features.transform import Transform


@pytest.fixture
def card(monkeypatch, device):
    """The measures of a card, made small where there is none."""
    card = imported("card")
    if device.type == "cpu":
        monkeypatch.setattr(card, "COPIED", 2**16)
        monkeypatch.setattr(card, "SIDE", 32)
        monkeypatch.setattr(card, "_TURN_SECONDS", 1e-5)
    return card


@pytest.fixture
def flags(device):
    """The flags of a benchmark, by name."""

    def of(**values) -> argparse.Namespace:
        return argparse.Namespace(**({"device": device.type, "seconds": 60.0, "threads": 1, "repeats": 1} | values))

    return of


def test_ceilings_are_rates(card, device):
    ceilings = card.Ceilings.measured(device.type)
    assert ceilings.copy > 0 < ceilings.upload
    assert list(ceilings.products) == list(card.PRECISIONS)
    assert "TB/s (read and written)" in str(ceilings)
    one_read = 1000 / ceilings.copy
    assert ceilings.reads(3 * one_read, 1000) == pytest.approx(3)
    assert ceilings.share(ceilings.products["fp32"], 2.0, "fp32") == pytest.approx(0.5)


def test_each_precision_computes_as_it_says(card, device):
    for precision in card.PRECISIONS:
        with card.computing(precision, device.type):
            is_autocast = torch.is_autocast_enabled(device.type)
        assert is_autocast == (precision == "bf16" or (device.type == "cuda" and precision == "fp16"))
        assert not torch.is_autocast_enabled(device.type)


def test_time_that_is_over_is_said(card):
    budget = card.Budget(0.0)
    assert budget.is_spent
    assert "TransMIL (--seconds gives more)" in budget.note(["TransMIL"])
    assert not card.Budget(60.0).is_spent
    assert card.Budget(60.0).note([]) == ""


@pytest.mark.parametrize("name", ["models", "nested_cv", "extraction", "prediction"])
def test_a_benchmark_takes_a_device(name):
    """In its own file, where whoever runs all benchmarks on a card looks for it."""
    assert '"--device"' in (BENCHMARKS / f"{name}.py").read_text()


def test_models_have_a_row_in_each_precision(card, flags, monkeypatch):
    models = imported("models")
    chosen = ["LiteMIL", "LiteMIL.forward_blocks"]
    monkeypatch.setattr(models, "MODELS", {name: models.MODELS[name] for name in chosen})
    monkeypatch.setattr(models, "BATCHES", {"LiteMIL.forward_bags": models.BATCHES["LiteMIL.forward_bags"]})
    monkeypatch.setattr(models, "SCENES", {"three bags": [40, 20, 5]})
    text = "\n".join(models.on_card(flags(sizes=[50], precisions=card.PRECISIONS)))
    rows = table_cells(text)
    names = [(row[0], row[1]) for row in rows]
    for name in [*models.MODELS, *models.BATCHES]:
        for precision in card.PRECISIONS:
            assert (name, precision) in names
    (row,) = [row for row in rows if row[:2] == ["LiteMIL", "bf16"]]
    assert float(row[2]) > 0 < float(row[6])
    assert row[4].endswith("%")
    assert "Ceilings of" in text


def test_models_that_no_time_is_left_for_are_named(card, flags):
    models = imported("models")
    *tables, note = models.on_card(flags(sizes=[50], precisions=["fp32"], seconds=0.0))
    assert len(tables) == 1
    assert "LiteMIL in fp32 (One bag of 50 instances)" in note


def test_a_cross_validation_is_timed_in_epochs_and_whole(card, flags, tmp_path, monkeypatch):
    nested_cv, on_card = imported("nested_cv"), imported("nested_cv_on_card")
    monkeypatch.setattr(on_card, "EPOCHS", 1)
    plan = replace(nested_cv.SMALL, slides=12, epochs=1, threads=1, dtype="float16", device=flags().device)
    text = "\n".join(on_card.on_card(plan, flags(jobs=[1]), tmp_path))
    rows = {row[0]: row[1:] for row in table_cells(text)}
    for name in ("kept on the card", "sent ahead"):
        assert float(rows[name][0]) > 0
        assert rows[name][4].endswith("%")
    assert float(rows["1"][0]) > 0
    assert 0 <= float(rows["1"][3]) <= 1
    assert "Not measured" not in text


def test_an_extraction_is_timed_alone_and_together(card, flags, tmp_path, monkeypatch):
    on_card = imported("extraction_on_card")

    def small(device: str):
        import timm

        network = timm.create_model("test_vit", pretrained=False, num_classes=0)
        return Backbone("test_vit", 64, Transform(resize=160), network, "").to(device)

    extraction = imported("extraction")
    blank = np.full((extraction.PERIOD, extraction.PERIOD, 3), 200, np.uint8)
    monkeypatch.setattr(extraction, "texture", lambda: blank)
    monkeypatch.setattr(on_card, "NETWORKS", {"test_vit": small})
    monkeypatch.setattr(on_card, "BATCHES", (2, 4))
    text = "\n".join(on_card.on_card(flags(patch=64, side=400, patches=20, threads=[1, 2]), tmp_path))
    rows = table_cells(text)
    network = [row for row in rows if row[0] == "test_vit"]
    assert [row[1] for row in network] == list(card.PRECISIONS)
    assert all(row[2].endswith("%)") for row in network)
    assert [row[0] for row in rows if row[0] in ("1", "2")] == ["2", "1"]
    assert "Not measured" not in text


def test_predictions_are_timed_from_the_file_and_on_the_card(card, flags, tmp_path):
    prediction = imported("prediction")
    text = "\n".join(prediction.on_card(flags(patches=300, dim=16, models=["LiteMIL", "maxPool"]), tmp_path))
    rows = {row[0]: row[1:] for row in table_cells(text)}
    for name in ("LiteMIL", "maxPool"):
        assert all(float(cell.replace(",", "")) >= 0 for cell in rows[name])
    assert "300 patches of 16 float16" in text
