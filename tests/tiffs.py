"""TIFFs to read back: an image, its colours, and what writes it."""

import numpy as np
import tifffile

from tests.synthetic import stained_image
from utils.slides.open_slides import open_slide

WIDTH, HEIGHT = 520, 400
PIXELS = stained_image(WIDTH, HEIGHT)
HALF = PIXELS.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
PLANES = np.moveaxis(PIXELS, -1, 0)
LABEL = PIXELS[:96, :192]
TILE = {"tile": (128, 128)}
STRIPS = {"rowsperstrip": 64}


def write(path, *images, **writer):
    """A TIFF of images, each with the keywords of tifffile."""
    with tifffile.TiffWriter(path, **writer) as file:
        for pixels, keywords in images:
            file.write(pixels, **{"photometric": "rgb", "metadata": None} | keywords)
    return path


def shown(path):
    """The slide's level 0, its levels, and its um/px."""
    with open_slide(path) as slide:
        return slide.read_level(0, 0, 0, slide.width, slide.height), slide.level_downsamples, slide.mpp
