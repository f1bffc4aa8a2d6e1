"""Where the real data lies, and slides every test of this wing may use."""

from pathlib import Path

import pytest

from tests.synthetic import place_image, write_pyramid

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PLACE_SIZE = 510, 408  # two and 1.6 level-0 px per grey level


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, or a skip."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not there: {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def place_slide(tmp_path_factory) -> Path:
    """A pyramid whose pixels know their place: levels of downsample 1, 2.5 and 4."""
    path = tmp_path_factory.mktemp("place") / "place.tiff"
    return write_pyramid(path, place_image(*PLACE_SIZE), mpp=0.5, downsamples=(1, 2.5, 4), tile=128)
