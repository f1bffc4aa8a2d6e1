"""What `extraction.py --device cuda` measures: the network alone, reading alone, and both as `extractFeatures.py` does.

Networks have random weights. The card waits in that share of an extraction which its network alone would not take.
"""

import argparse
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import card
import torch
from extraction import write_slide
from nested_cv_on_card import wall
from report import table
from torch.utils.flop_counter import FlopCounterMode

from utils.core.device import amp_dtype, uses_tf32
from utils.core.runtime import keep_freed_memory, processors
from utils.features.backbones import Backbone, backbone_spec
from utils.features.encoding import Encoder
from utils.features.settings import Extraction
from utils.slides.open_slides import open_slide
from utils.slides.patching import PatchGrid, PatchPlan, plan_patches, read_batches
from utils.slides.slide import Slide

BATCHES = (64, 256)  # patches per forward pass


def untrained(name: str, device: str) -> Backbone:
    """Return a backbone of the registry with random weights, on the device."""
    spec = backbone_spec(name)
    with torch.device(device):
        module = spec.build().eval()
    module = spec.finish(module) if spec.finish else module
    return Backbone(spec.name, spec.dim, spec.transform, module, "", spec.precision).to(device)


NETWORKS: dict[str, Callable[[str], Backbone]] = {
    "ResNet50": partial(untrained, "resnet50"),
    "ViT-L/16": partial(untrained, "uni"),
}


def flops_of(backbone: Backbone, patch: int) -> float:
    """Return the operations for one patch."""
    images = torch.zeros(1, patch, patch, 3, dtype=torch.uint8, device=backbone.device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        backbone.module(next(backbone.prepare(images)))
    return counter.get_total_flops()


def network_rows(name: str, backbone: Backbone, asked: argparse.Namespace, ceilings: card.Ceilings) -> list[list[str]]:
    """Return a row per precision: patches per second of the network alone, for each batch size, with the share of the
    products' ceiling; and the most memory.
    """
    flops, rows = flops_of(backbone, asked.patch), []
    for precision in card.PRECISIONS:
        cells = [name, precision]
        with card.computing(precision, asked.device):
            for size in BATCHES:
                patches = torch.randint(0, 256, (size, asked.patch, asked.patch, 3), dtype=torch.uint8)
                run = partial(backbone.embed, patches.to(asked.device))
                taken = card.median_seconds(run, asked.device)
                share = ceilings.share(flops * size, taken, precision)
                cells.append(f"{size / taken:,.0f} ({share:.1%})")
            cells.append(f"{card.peak_bytes(run) / 1e6:,.0f}")
        rows.append(cells)
    return rows


def planned(slide: Slide, patch: int, count: int) -> PatchPlan:
    plan = plan_patches(slide, PatchGrid(patch, tissue_threshold=0))
    return replace(plan, coords=plan.coords[:count])


def read(slide: Slide, plan: PatchPlan, workers: int, device: str) -> None:
    for _ in read_batches(slide, plan, Extraction.batch_size, workers=workers, pin_memory=device == "cuda"):
        pass


def encode(backbone: Backbone, slide: Slide, plan: PatchPlan, workers: int) -> None:
    """Extract as `extractFeatures.py` does, in the backbone's own precision."""
    place = backbone.device
    config = Extraction(num_workers=workers, device=str(place))
    own = amp_dtype("auto", place, backbone.precision)
    for _ in Encoder(config, backbone, own, uses_tf32("auto", place), threading.Event()).encode(slide, plan):
        pass


def alone_seconds(backbone: Backbone, plan: PatchPlan, patch: int) -> float:
    """Return the seconds that the network alone takes for a plan's patches, in its own precision."""
    device = backbone.device.type
    own = amp_dtype("auto", backbone.device, backbone.precision)
    patches = torch.zeros(Extraction.batch_size, patch, patch, 3, dtype=torch.uint8, device=device)
    with torch.autocast(device, dtype=own, enabled=own is not None):
        return card.median_seconds(partial(backbone.embed, patches), device) * len(plan) / len(patches)


def thread_counts(asked: argparse.Namespace) -> list[int]:
    """Return the numbers of reader threads: those given, else powers of two up to the processors."""
    return asked.threads or [2**power for power in range(processors().bit_length())]


def pipeline_rows(
    path: Path, networks: dict[str, Backbone], asked: argparse.Namespace, budget: card.Budget, skipped: list[str]
) -> list[list[str]]:
    """Return a row per number of reader threads: patches per second of reading alone, and with each network, with the
    share of the time in which the card waits.
    """
    rows = []
    with open_slide(path) as slide:
        plan = planned(slide, asked.patch, asked.patches)
        read(slide, planned(slide, asked.patch, Extraction.batch_size), 1, asked.device)
        alone = {name: alone_seconds(backbone, plan, asked.patch) for name, backbone in networks.items()}
        for workers in reversed(thread_counts(asked)):  # the fewest, which take longest, last
            if budget.is_spent:
                skipped.append(f"{workers} reader threads")
                continue
            reading = wall(partial(read, slide, plan, workers, asked.device), asked.device)
            cells = [str(workers), f"{len(plan) / reading:,.0f}"]
            for name, backbone in networks.items():
                taken = wall(partial(encode, backbone, slide, plan, workers), asked.device)
                cells.append(f"{len(plan) / taken:,.0f} ({max(0.0, 1 - alone[name] / taken):.0%})")
            rows.append(cells)
    return rows


def on_card(asked: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield the tables of a card."""
    keep_freed_memory()
    budget, skipped = card.Budget(asked.seconds), []
    ceilings = card.Ceilings.measured(asked.device)
    yield f"{ceilings}\n"
    networks = {name: make(asked.device) for name, make in NETWORKS.items()}
    rows = [row for name, backbone in networks.items() for row in network_rows(name, backbone, asked, ceilings)]
    sizes = " | ".join(f"batches of {size}" for size in BATCHES)
    yield f"The network alone: patches/s of {asked.patch} px, and in brackets the share of the products' ceiling\n"
    yield f"{table(f'network | precision | {sizes} | MB', rows)}\n"
    path = write_slide(folder / "slide.tif", asked.side, 256)
    rows = pipeline_rows(path, networks, asked, budget, skipped)
    yield f"Reading, and reading with a network: patches/s of {asked.patches:,}; in brackets how long the card waits\n"
    yield f"{table(' | '.join(['reader threads', 'reading alone', *networks]), rows)}\n"
    yield budget.note(skipped)
