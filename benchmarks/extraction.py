"""From a slide to its features: OpenSlide and the first version's way against ours, as Markdown tables.

    uv run benchmarks/extraction.py
    uv run benchmarks/extraction.py --side 5000 --patches 300 --repeats 3
    uv run benchmarks/extraction.py --device cuda

A synthetic slide of each tile size is written as a JPEG pyramid. The contenders read it in alternating turns, in one
process, from the system's cache, so that reading is measured and not the disk. Results are first checked to be equal:
pixels exactly, features to rounding.

The first version's way is one patch after the other: OpenSlide, PIL, torchvision's transforms, and batches of 64 by
the network as published. The memory part runs each extraction in a process of its own.

On a card (see `extraction_on_card.py`): the network alone, reading alone, and both.
"""

import argparse
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import card
import imagecodecs
import numpy as np
import openslide
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from report import processor, table, versions
from scipy import ndimage
from torch import Tensor, nn
from torchvision import transforms

from utils.core.runtime import keep_freed_memory
from utils.feature_extractor import WSIFeatureExtractor
from utils.features.backbones import Backbone, backbone_spec
from utils.features.transform import IMAGENET_MEAN, IMAGENET_STD
from utils.slides.open_slides import open_slide
from utils.slides.patching import PatchGrid, plan_patches, read_batches

QUALITY = 80
PERIOD = 1200  # px after which the slide's texture repeats; not a multiple of the tiles, so that those differ
DOWNSAMPLES = (1, 4, 16)
BATCH = 64
HALF_PRECISION = 5e-4  # of a number: the spacing of float16
FIRST = "OpenSlide, one by one"

Corner = tuple[int, int]
Read = Callable[[Corner], NDArray[np.uint8]]


def texture(seed: int = 0) -> NDArray[np.uint8]:
    """Return (PERIOD, PERIOD, 3) uint8 that looks like H&E and tiles without a seam."""
    rng = np.random.default_rng(seed)

    def noise(sigma: float) -> NDArray[np.float64]:
        field = ndimage.gaussian_filter(rng.standard_normal((PERIOD, PERIOD)), sigma, mode="wrap")
        return field / field.std()

    stroma = np.clip(0.6 + 0.3 * noise(12) + 0.15 * noise(2), 0, None)
    nuclei = ndimage.gaussian_filter((noise(5) > 1.2).astype(np.float64), 0.8, mode="wrap")
    nuclei *= np.clip(1 + 0.3 * noise(1.2), 0.3, None)
    density = stroma[..., None] * [0.05, 0.35, 0.18] + nuclei[..., None] * [0.45, 0.50, 0.22]
    image = 244 * 10**-density + rng.normal(0, 2.0, (PERIOD, PERIOD, 1))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def jpeg_tiles(image: NDArray[np.uint8], side: int, tile: int) -> Iterator[bytes]:
    """Return the JPEG tiles of a level of side x side px, filled by repeating the image."""
    for top in range(0, side, tile):
        rows = np.arange(top, top + tile) % len(image)
        for left in range(0, side, tile):
            columns = np.arange(left, left + tile) % len(image)
            yield imagecodecs.jpeg8_encode(image[np.ix_(rows, columns)], QUALITY, subsampling="420")


def write_slide(path: Path, side: int, tile: int) -> Path:
    """Write a BigTIFF pyramid of JPEG tiles, YCbCr 4:2:0; with tiles of 240 px OpenSlide takes it for Aperio's."""
    image = texture()
    described = f"Aperio Image Library\r\n{side}x{side} ({tile}x{tile}) JPEG/YCC Q={QUALITY}|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for factor in DOWNSAMPLES:
            level = image.reshape(PERIOD // factor, factor, PERIOD // factor, factor, 3).mean((1, 3)).astype(np.uint8)
            writer.write(
                jpeg_tiles(level, side // factor, tile),
                shape=(side // factor, side // factor, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(2, 2),
                subfiletype=int(factor > 1),
                description=described if tile == 240 else None,
                metadata=None,
            )
    return path


def grid(side: int, patch: int, count: int) -> list[Corner]:
    """Return the first patches of a slide, row by row."""
    places = range(0, side - patch + 1, patch)
    return [(x, y) for y in places for x in places][:count]


def read_all(read: Read, corners: list[Corner], threads: int) -> None:
    """Read every patch and drop it; each thread reads runs of neighbours, as in an extraction."""

    def read_run(run: list[Corner]) -> None:
        for corner in run:
            read(corner)

    if threads == 1:
        read_run(corners)
        return
    step = BATCH // threads
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read_run, (corners[start : start + step] for start in range(0, len(corners), step))):
            pass


def through_openslide(handle: openslide.OpenSlide, patch: int, corner: Corner) -> NDArray[np.uint8]:
    return np.asarray(handle.read_region(corner, 0, (patch, patch)).convert("RGB"))


def check_equal(path: Path, corners: list[Corner], patch: int) -> None:
    with openslide.OpenSlide(path) as handle, open_slide(path) as slide:
        for corner in corners:
            ours, theirs = slide.read_level(0, *corner, patch, patch), through_openslide(handle, patch, corner)
            if not np.array_equal(ours, theirs):
                raise AssertionError(f"{path}: the patch at {corner} is not OpenSlide's")


def openslide_seconds(path: Path, corners: list[Corner], patch: int, threads: int) -> float:
    """Return the seconds of reading with OpenSlide, with a new handle, so that no tile is in its cache."""
    with openslide.OpenSlide(path) as handle:
        read = partial(through_openslide, handle, patch)
        before = time.perf_counter()
        read_all(read, corners, threads)
        return time.perf_counter() - before


def our_seconds(path: Path, corners: list[Corner], patch: int, threads: int) -> float:
    """Return the seconds of reading with our reader, which is chosen and verified before the clock starts."""
    with open_slide(path) as slide:
        slide.read_level(0, slide.width - 1, slide.height - 1, 1, 1)
        before = time.perf_counter()
        read_all(lambda corner: slide.read_level(0, *corner, patch, patch), corners, threads)
        return time.perf_counter() - before


def decoding_seconds(path: Path, corners: list[Corner], patch: int, threads: int) -> float:
    """Return the seconds of decoding each tile that the patches touch once: the lower bound."""
    with tifffile.TiffFile(path) as file, path.open("rb") as source:
        page = file.pages.first
        tile, across = page.tilewidth, -(-page.imagewidth // page.tilewidth)
        touched = {
            row * across + column
            for x, y in corners
            for row in range(y // tile, (y + patch - 1) // tile + 1)
            for column in range(x // tile, (x + patch - 1) // tile + 1)
        }
        data = []
        for index in sorted(touched):
            source.seek(page.dataoffsets[index])
            data.append(source.read(page.databytecounts[index]))
    before = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(imagecodecs.jpeg8_decode, data):
            pass
    return time.perf_counter() - before


def first_read(path: Path) -> float:
    """Return the seconds to open a slide and to choose and verify its reader."""
    before = time.perf_counter()
    with open_slide(path) as slide:
        slide.read_level(0, 0, 0, 1, 1)
        return time.perf_counter() - before


def reading(folder: Path, asked: argparse.Namespace) -> Iterator[str]:
    """Measure reading patches in grid order, with OpenSlide one by one and with our reader."""
    rows: dict[str, list[str]] = {}
    opening = []
    for tile in asked.tiles:
        path = write_slide(folder / f"tiles_{tile}.{'svs' if tile == 240 else 'tif'}", asked.side, tile)
        corners = grid(asked.side, asked.patch, asked.patches)
        check_equal(path, corners, asked.patch)
        contenders = {FIRST: partial(openslide_seconds, threads=1)}
        for threads in asked.threads:
            number = f"{threads} thread{'s' * (threads > 1)}"
            if threads > 1:
                contenders[f"OpenSlide, {number}"] = partial(openslide_seconds, threads=threads)
            contenders[f"LiteMIL, {number}"] = partial(our_seconds, threads=threads)
            contenders[f"JPEG decoding alone, {number}"] = partial(decoding_seconds, threads=threads)
        turns = {name: partial(run, path, corners, asked.patch) for name, run in contenders.items()}
        times = medians(turns, asked.repeats)
        for name, taken in times.items():
            rows.setdefault(name, [name]).append(f"{len(corners) / taken:,.0f} ({times[FIRST] / taken:.1f})")
        opening.append(statistics.median(first_read(path) for _ in range(asked.repeats)))
    heading = f"{asked.side:,} x {asked.side:,} px, {len(corners):,} patches of {asked.patch} px, every pixel the same"
    yield f"### Reading: {heading}\n\nPatches/s, and in brackets the multiple of OpenSlide's\n"
    yield table(" | ".join(["", *(f"{tile}-px tiles" for tile in asked.tiles)]), list(rows.values()))
    milliseconds = " and ".join(f"{seconds * 1e3:.0f}" for seconds in opening)
    yield f"\nOpening a slide and verifying its reader, once a slide: {milliseconds} ms"


def first_batches(path: Path, corners: list[Corner], patch: int) -> Iterator[Tensor]:
    """Yield batches (B, 3, patch, patch) float32 as the first version made them."""
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    with openslide.OpenSlide(path) as handle:
        for start in range(0, len(corners), BATCH):
            patches = (through_openslide(handle, patch, corner) for corner in corners[start : start + BATCH])
            yield torch.stack([prepare(Image.fromarray(pixels)) for pixels in patches])


def our_batches(path: Path, count: int, patch: int, workers: int) -> Iterator[Tensor]:
    """Yield the same batches as `extractFeatures.py` reads and prepares them on a CPU, a few patches at a time."""
    spec = backbone_spec("resnet50")
    backbone = Backbone(spec.name, spec.dim, spec.transform, nn.Identity(), weights_digest="")
    with open_slide(path) as slide:
        plan = plan_patches(slide, PatchGrid(patch, tissue_threshold=0))
        plan = replace(plan, coords=plan.coords[:count])
        for batch in read_batches(slide, plan, BATCH, workers=workers):
            yield from backbone.prepare(batch)


def exhaust(batches: Callable[[], Iterator[Tensor]]) -> None:
    for _ in batches():
        pass


def feeding(folder: Path, asked: argparse.Namespace) -> Iterator[str]:
    """Measure reading and preparing batches for the network."""
    keep_freed_memory()  # as the extractor does; all contenders gain
    torch.set_num_threads(1)
    path = write_slide(folder / "feeding.tif", asked.side, 256)
    corners = grid(asked.side, asked.patch, asked.patches)
    feeders = {FIRST: partial(first_batches, path, corners, asked.patch)} | {
        f"LiteMIL, {threads} reader{'s' * (threads > 1)}": partial(
            our_batches, path, len(corners), asked.patch, workers=threads
        )
        for threads in asked.threads
    }
    batches = (itertools.chain.from_iterable(feeder()) for feeder in list(feeders.values())[:2])
    for theirs, ours in zip(*batches, strict=True):
        torch.testing.assert_close(ours, theirs)
    times = medians({name: partial(timed, partial(exhaust, feeder)) for name, feeder in feeders.items()}, asked.repeats)
    heading = f"{len(corners):,} patches of {asked.patch} px of 256-px tiles to batches of {BATCH} normalised images"
    yield f"### Feeder: {heading}\n"
    rows = [[name, f"{len(corners) / taken:,.0f}", f"{times[FIRST] / taken:.1f}"] for name, taken in times.items()]
    yield table(" | patches/s | multiple", rows)


def plain_features(path: Path, network: nn.Module, patch: int, count: int) -> NDArray[np.float32]:
    """Return the features of the first version's batches, from the published network."""
    with torch.no_grad():
        corners = grid(int(count**0.5) * patch, patch, count)
        return torch.cat([network(batch) for batch in first_batches(path, corners, patch)]).numpy()


def extracting(folder: Path, asked: argparse.Namespace) -> Iterator[str]:
    """Measure a whole extraction, from slide to features, on a CPU."""
    torch.set_num_threads(max(asked.threads))
    torch.manual_seed(0)
    count = asked.extracted**2
    path = write_slide(folder / "extracting.tif", asked.extracted * asked.patch, 256)
    network = backbone_spec("resnet50").build().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # not what changes nothing
            nn.init.uniform_(module.weight, 0.5, 1.5)
    weights = folder / "resnet50.pth"
    torch.save(network.state_dict(), weights)
    extractor = WSIFeatureExtractor("resnet50", asked.patch, tissue_threshold=0, device="cpu", weights=weights)
    plain, ours = (
        partial(plain_features, path, network, asked.patch, count),
        lambda: extractor.process(path, folder / "slide.h5")["features"].astype(np.float32),
    )
    difference = np.linalg.norm(plain() - ours()) / np.linalg.norm(plain())
    if difference > HALF_PRECISION:
        raise AssertionError(f"the features differ by {difference:.1e}, more than their float16 does")
    times = medians({FIRST: partial(timed, plain), "LiteMIL": partial(timed, ours)}, asked.repeats)
    yield f"### Whole extraction: ResNet50 in single precision on {max(asked.threads)} CPU threads, {count:,} patches\n"
    rows = [[name, f"{count / taken:,.1f}", f"{times[FIRST] / taken:.1f}"] for name, taken in times.items()]
    yield table(" | patches/s | multiple", rows)
    yield f"\nThe features differ by {difference:.1e} of their size; they are stored in float16."


def timed(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def peak_megabytes(path: Path, stride: int) -> tuple[int, float]:
    """Return the number of patches of an extraction to a file, and the peak memory of this process; on Linux."""
    extractor = WSIFeatureExtractor("stain", 256, stride, tissue_threshold=0, device="cpu", num_workers=2)
    found = extractor.extract_to(path, path.with_suffix(".h5"))
    # Not what `resource` knows: that begins with the memory of the process that started this one.
    kilobytes = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return len(found.coords), int(kilobytes[1]) / 1e3 if kilobytes else float("nan")


def memory(folder: Path, asked: argparse.Namespace) -> Iterator[str]:
    """Measure the peak memory of a process for few and for many patches of one slide."""
    path = write_slide(folder / "memory.tif", asked.side, 256)
    rows = []
    for stride in asked.strides:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            count, peak = process.submit(peak_megabytes, path, stride).result()
        rows.append([f"{count:,}", f"{peak:,.0f}"])
    yield "### Memory: the most that the process of an extraction takes (`stain`)\n"
    yield table("patches | MB", rows)


PARTS: dict[str, Callable[[Path, argparse.Namespace], Iterator[str]]] = {
    "reading": reading,
    "feeding": feeding,
    "extracting": extracting,
    "memory": memory,
}


def medians(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each contender, in alternating turns, after one that fills caches."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = run()
            if turn:
                times[name].append(taken)
        print(".", end="", file=sys.stderr, flush=True)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--side", type=int, default=20_000, help="px of the slides")
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 240], help="px of their tiles")
    parser.add_argument("--patch", type=int, default=256, help="px")
    parser.add_argument(
        "--patches", type=int, help="read in a turn, from the first row on (default: 6000; on a card 2000)"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", help="readers (default: 1 2; on a card 1, 2, 4, ... processors)"
    )
    parser.add_argument("--extracted", type=int, default=12, help="rows and columns of patches that are extracted")
    parser.add_argument("--strides", type=int, nargs="+", default=[624, 64], help="px, of the memory part")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--folder", type=Path, help="where the slides go, a temporary folder by default")
    parser.add_argument("--device", choices=card.DEVICES, default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=card.SECONDS, help="on a card: begin nothing more after so many"
    )
    asked = parser.parse_args()
    asked.patches = asked.patches or (2000 if asked.device == "cuda" else 6000)
    lines = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        if asked.device == "cuda":
            from extraction_on_card import on_card

            for text in on_card(asked, Path(folder)):
                print(text, flush=True)
            return
        asked.threads = asked.threads or [1, 2]
        for part in asked.parts:
            lines += ["", *PARTS[part](Path(folder), asked)]
    print(", ".join(["\n" + processor(), f"{asked.repeats} turns", *versions()]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
