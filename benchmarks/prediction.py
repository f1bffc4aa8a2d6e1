"""What the prediction of a slide of a million patches costs, beyond reading and projecting them, as a Markdown table.

    uv run benchmarks/prediction.py
    uv run benchmarks/prediction.py --patches 100000 --models LiteMIL ABMIL --repeats 5
    uv run benchmarks/prediction.py --device cuda

The slide is synthetic: normal numbers in float16, in one of our HDF5 files that was just written and is in the system's
memory. Each model predicts it whole with `SlidePredictor`, attention included, in a process of its own.

time      of a prediction, as a multiple of what anyone would need: h5py's blocks of 4096 rows, each to float32 and
          through a linear layer of the model's own width. The two take turns; medians
memory    the most that the process takes during the prediction, beyond what it takes idle with the model loaded
evidence  the time of a prediction with evidence, as a multiple of one without, and its memory; medians of turns
faithfulness  the time of `--faithfulness`, as a multiple of reading and projecting

On a card, in one process: seconds of a prediction from the file, with evidence and of faithfulness, as multiples of
reading the file alone; of a prediction of features that lie on the card, as a multiple of one read of them at the speed
at which the card copies; and the most memory on the card.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import card
import h5py
import numpy as np
import torch
from models import in_own_process, peak_of
from report import processor, table, versions

from MILS import build_mil, list_mils
from MILS.mergeable import MergeableModel
from utils.bags.store import StoredFeatures, bag_writer
from utils.inference import SlidePredictor
from utils.prediction.checkpoint import Checkpoint, save_checkpoint
from utils.prediction.forward_pass import SlideFeed, blocks_of, predict_features, set_references
from utils.prediction.slide_prediction import SlidePrediction

_BLOCK = 4096


def write_slide(path: Path, patches: int, dim: int) -> Path:
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(patches)))
    with bag_writer(path, dim, "float16") as writer:
        for start in range(0, patches, 2**14):
            rows = min(2**14, patches - start)
            writer.append(rng.standard_normal((rows, dim), dtype=np.float32).astype(np.float16))
        place = np.arange(patches)
        writer.finish(np.stack([place % side, place // side], axis=1) * 256, 256, None)
    return path


def write_model(path: Path, name: str, dim: int) -> Path:
    torch.manual_seed(0)
    model = build_mil(name, input_dim=dim, num_classes=2)
    set_references(model, lambda: [torch.randn(100, dim)], SlideFeed(None, "merge"))
    feed, seen = SlideFeed(None, "merge").as_dict(), {"slide": [], "case": []}
    save_checkpoint(
        path, Checkpoint(model.spec, model.state_dict(), ("a", "b"), "synthetic", feed, None, None, {}, seen)
    )
    return path


def read_and_project(path: Path, layer: torch.nn.Linear) -> None:
    with torch.inference_mode(), h5py.File(path) as file:
        features = file["features"]
        assert isinstance(features, h5py.Dataset)  # noqa: S101 - for the type checker
        for start in range(0, len(features), _BLOCK):
            layer(torch.from_numpy(features[start : start + _BLOCK]).float())


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def predicted(predictor: SlidePredictor, slide: Path, evidence: bool = False) -> SlidePrediction:
    return predictor.predict_bag(predictor.bag(slide), slide, "full", evidence=evidence)


def peak(slide: Path, checkpoint: Path, evidence: bool) -> int:
    """Return the memory in bytes that a prediction takes beyond the loaded model, in a process that has made none."""
    predictor = SlidePredictor(checkpoint, device="cpu")
    return peak_of(lambda: [predicted(predictor, slide, evidence)].clear())


def measured(slide: Path, checkpoint: Path, repeats: int) -> list[float]:
    """Return the times of a model: of a prediction over reading and projecting, of one with evidence over one without,
    and of faithfulness over reading and projecting.
    """
    predictor = SlidePredictor(checkpoint, device="cpu")

    def predict() -> SlidePrediction:
        return predicted(predictor, slide)

    def argue() -> SlidePrediction:
        return predicted(predictor, slide, evidence=True)

    (model,) = predictor.models
    assert isinstance(model, MergeableModel)  # noqa: S101 - for the type checker: only those are asked for
    layer = model.instance_layers()[0]
    assert isinstance(layer, torch.nn.Linear)  # noqa: S101 - for the type checker
    turns = [
        (seconds(lambda: read_and_project(slide, layer)), seconds(predict), seconds(argue)) for _ in range(repeats)
    ]
    base, whole, argued = (statistics.median(times) for times in zip(*turns, strict=True))
    faithfulness = seconds(lambda: predictor.faithfulness(predict())) / base
    return [whole / base, argued / whole, faithfulness]


def cells(times: Sequence[float], peaks: Sequence[int]) -> list[str]:
    whole, argued, faithfulness = times
    memory, evidence_memory = (f"{size / 1e6:,.0f} MB" for size in peaks)
    return [f"{whole:.2f}", memory, f"{argued:.2f}", evidence_memory, f"{faithfulness:.1f}"]


def on_card(asked: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield the tables of a card."""
    budget, rows, skipped = card.Budget(asked.seconds), [], []
    ceilings = card.Ceilings.measured(asked.device)
    yield f"{ceilings}\n"
    slide = write_slide(folder / "slide.h5", asked.patches, asked.dim)
    for mil in asked.models:
        if budget.is_spent:
            skipped.append(mil)
            continue
        predictor = SlidePredictor(write_model(folder / f"{mil}.pth", mil, asked.dim), device=asked.device)
        rows.append([mil, *cells_on_card(predictor, slide, ceilings, budget)])
    yield f"{asked.patches:,} patches of {asked.dim} float16\n"
    heading = "model | reading, s | from the file | with evidence | faithfulness | on the card, s | reads | MB"
    yield table(heading, rows)
    yield budget.note(skipped)


def cells_on_card(predictor: SlidePredictor, slide: Path, ceilings: card.Ceilings, budget: card.Budget) -> list[str]:
    """Return what a model's predictions cost on a card; no faithfulness, the longest, when half the time is over."""
    device = ceilings.device
    whole = predictor.bag(slide).features
    assert isinstance(whole, StoredFeatures)  # noqa: S101 - for the type checker

    def read() -> None:
        for _ in blocks_of(whole, predictor.models[0]):
            pass

    predicted(predictor, slide)  # warm up
    memory = card.peak_bytes(lambda: predicted(predictor, slide))
    reading, taken, argued = (
        seconds(work)
        for work in (read, lambda: predicted(predictor, slide), lambda: predicted(predictor, slide, evidence=True))
    )
    features = whole.whole().to(device)
    feed = SlideFeed(None, "merge")

    def on_device() -> None:
        predict_features(predictor.task, predictor.models[0], features, feed, attention=True)

    alone = card.median_seconds(on_device, device)
    faithful = ""
    if budget.spent < 0.5:
        prediction = predicted(predictor, slide)
        faithful = f"{seconds(lambda: predictor.faithfulness(prediction)) / reading:.1f}"
    return [
        f"{reading:.2f}", f"{taken / reading:.2f}", f"{argued / reading:.2f}", faithful, f"{alone:.4f}",
        f"{ceilings.reads(alone, features.nbytes):.1f}", f"{memory / 1e6:,.0f}",
    ]  # fmt: skip


def main() -> None:
    description, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [name for name in list_mils() if name != "TransMIL"]
    parser.add_argument("--patches", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--models", nargs="+", default=models, choices=models, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3, help="turns, on a CPU")
    parser.add_argument("--device", choices=card.DEVICES, default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=card.SECONDS, help="on a card: begin nothing more after so many"
    )
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.device == "cuda":
            for text in on_card(asked, folder):
                print(text, flush=True)
            return
        slide = write_slide(folder / "slide.h5", asked.patches, asked.dim)
        for mil in asked.models:
            # In a process of its own too: one that is forked after PyTorch has used its threads hangs.
            checkpoint = in_own_process(partial(write_model, folder / f"{mil}.pth", mil, asked.dim))
            times = in_own_process(partial(measured, slide, checkpoint, asked.repeats))
            peaks = [in_own_process(partial(peak, slide, checkpoint, evidence)) for evidence in (False, True)]
            rows.append([mil, *(cells(times, peaks) if times and None not in peaks else ["-"] * 5)])
    print(f"{processor()}, {', '.join(versions())}, {torch.get_num_threads()} threads")
    print(f"{asked.patches:,} patches of {asked.dim} float16, {asked.repeats} turns\n")
    print(table("model | time | memory beyond idle | evidence | memory with evidence | faithfulness", rows))


if __name__ == "__main__":
    main()
