"""Slides that every test of this folder may use."""

from pathlib import Path

import pytest

from tests.synthetic import place_image, write_pyramid

PLACE_SIZE = 510, 408  # two and 1.6 level-0 px per grey level


@pytest.fixture(scope="session")
def place_slide(tmp_path_factory) -> Path:
    """A pyramid whose pixels know their place: levels of downsample 1, 2.5 and 4."""
    path = tmp_path_factory.mktemp("place") / "place.tiff"
    return write_pyramid(path, place_image(*PLACE_SIZE), mpp=0.5, downsamples=(1, 2.5, 4), tile=128)
