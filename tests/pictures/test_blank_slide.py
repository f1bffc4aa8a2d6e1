"""What stands for a slide that is not at hand."""

import numpy as np
import pytest

from utils.bags.store import Bag
from utils.core.passport import Passport
from utils.core.recipe import Recipe
from utils.pictures.attention_map import AttentionMap
from utils.pictures.blank_slide import BlankSlide
from utils.pictures.picture_set import overview

COORDS = np.array([[100, 60], [150, 60]])


def bag(**slide) -> Bag:
    return Bag(np.zeros((2, 4), np.float32), COORDS, 50, Passport(Recipe(), slide))


@pytest.mark.parametrize(
    ("slide", "corner", "size"),
    [
        ({"width": 600, "height": 400, "bounds": [80, 40, 300, 200]}, (80, 40), (300, 200)),
        ({"width": 600, "height": 400}, (0, 0), (600, 400)),
        ({}, (0, 0), (200, 110)),  # it just holds the patches
    ],
)
def test_what_was_scanned_is_white_ground_as_far_as_the_file_records_it(slide, corner, size):
    ground = BlankSlide.of("s", bag(**slide), 50)
    picture = overview(ground, AttentionMap(COORDS, np.array([0.25, 0.75]), 50))
    assert (picture.corner, (picture.width, picture.height)) == (corner, size)
    assert picture.is_blank
    assert (picture.thumbnail == 255).all()
    assert picture.shape == size[::-1]
