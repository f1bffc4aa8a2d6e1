"""Loading features: the first version's way against ours, as Markdown tables.

    uv run benchmarks/loading.py
    uv run benchmarks/loading.py --slides 4 --patches 20000 --dtype float16 --threads 1

Synthetic slides are written as CLAM does (chunks of 32 patches), as TRIDENT does (chunks of 1), without chunks and as
LiteMIL does, and read by contenders that take turns, in one process, from files the system has in memory: what is
measured is the reading, not the disk. MB are of features as stored.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from report import processor, table, versions

from utils.bags.packed import FileFeatures
from utils.bags.store import Bag, peek_bag, write_bag
from utils.mil_dataset import MILDataset

CHUNK = 1000
LABELLED = 500  # slides whose labels are asked for
FIRST = "first version"


def write_clam(path: Path, features: np.ndarray, coords: np.ndarray) -> None:
    """Write features as CLAM does: 256 patches at a time, coordinates after features, in chunks of 32 patches."""
    kept = {"features": features, "coords": coords.astype(np.int32)}
    with h5py.File(path, "w") as file:
        for name, values in kept.items():
            width = values.shape[1]
            file.create_dataset(name, (0, width), values.dtype, chunks=(32, width), maxshape=(None, width))
        for start in range(0, len(features), 256):
            for name, values in kept.items():
                file[name].resize(min(start + 256, len(features)), axis=0)
                file[name][start : start + 256] = values[start : start + 256]


def write_trident(path: Path, features: np.ndarray, coords: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for name, values in (("features", features), ("coords", coords)):
            file.create_dataset(name, data=values, chunks=(1, values.shape[1]), maxshape=(None, values.shape[1]))


def write_contiguous(path: Path, features: np.ndarray, coords: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, coords


LAYOUTS: dict[str, Callable[[Path, np.ndarray, np.ndarray], None]] = {
    "CLAM, (32, D)": write_clam,
    "TRIDENT, (1, D)": write_trident,
    "contiguous": write_contiguous,
    "LiteMIL": lambda path, features, coords: write_bag(path, Bag(features, coords)),
}


def first_version(paths: list[Path]) -> Iterator[torch.Tensor]:
    """Read a slide as the first version did: each chunk opens the file, reads coordinates too, converts to float32."""
    for path in paths:
        with h5py.File(path, "r") as file:
            length = file["features"].shape[0]
        for start in range(0, length, CHUNK):
            with h5py.File(path, "r") as file:
                features = torch.from_numpy(file["features"][start : start + CHUNK]).float()
                torch.from_numpy(file["coords"][start : start + CHUNK]).float()
            yield features


def whole_slides(features: FileFeatures) -> Iterator[torch.Tensor]:
    for slide in range(len(features.paths)):
        yield features(slide)


def chunks(dataset: MILDataset) -> Iterator[torch.Tensor]:
    """Yield chunks as training gets them: copies of neighbouring patches, or of a random choice over the slide."""
    for batch in dataset.batches(range(len(dataset)), 1, seed=0):
        yield batch.bags[0]


def contenders(paths: list[Path], folder: Path) -> dict[str, Callable[[], Iterable[torch.Tensor]]]:
    info = [peek_bag(path) for path in paths]
    csv = write_labels(folder, paths)

    def files() -> FileFeatures:
        return FileFeatures(paths, info, "features")

    def dataset(cache: str, sequential: bool = False) -> MILDataset:
        return MILDataset(csv, paths[0].parent, chunk_size=CHUNK, sequential=sequential, cache=cache)

    known, packed = files(), str(folder)
    in_order, at_random, in_memory = dataset(packed, sequential=True), dataset(packed), dataset("ram")
    return {
        FIRST: lambda: first_version(paths),
        "files, first touch": lambda: whole_slides(files()),
        "files, known already": lambda: whole_slides(known),
        "packed file, chunks in order": lambda: chunks(in_order),
        "packed file, chunks at random": lambda: chunks(at_random),
        "memory, chunks at random": lambda: chunks(in_memory),
    }


def write_labels(folder: Path, paths: list[Path]) -> Path:
    lines = [f"P{number},{path.stem},{'ab'[number % 2]}" for number, path in enumerate(paths)]
    (folder / "labels.csv").write_text("\n".join(["case_id,wsi_id,label", *lines]) + "\n")
    return folder / "labels.csv"


def seconds(run: Callable[[], Iterable[torch.Tensor]]) -> float:
    before = time.perf_counter()
    for _ in run():
        pass
    return time.perf_counter() - before


def measure(paths: list[Path], folder: Path, repeats: int) -> dict[str, float]:
    """Return the median seconds of each contender, in alternating turns."""
    runs = contenders(paths, folder)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if turn:  # the first turn fills caches
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def label_pass(folder: Path, slides: int) -> list[list[str]]:
    """Return milliseconds per 1000 slides to read lengths and labels. Slides are small, as features are not needed."""
    (folder / "features").mkdir(parents=True)
    paths = [folder / "features" / f"S{number}.h5" for number in range(slides)]
    for path in paths:
        write_bag(path, Bag(np.zeros((10, 64), np.float32), np.zeros((10, 2), np.int64)))
    csv = write_labels(folder, paths)

    def dataset(cache: str) -> MILDataset:
        return MILDataset(csv, paths[0].parent, cache=cache)

    dataset(str(folder / "packed"))
    ready = dataset("off")
    cases: dict[str, Callable[[], object]] = {
        f"{FIRST}: every item is loaded for its label": lambda: [len(bag) for bag in first_version(paths)],
        "a new MILDataset looks into every file": lambda: dataset("off"),
        "a new MILDataset finds a packed file": lambda: dataset(str(folder / "packed")),
        "lengths and labels of a MILDataset": lambda: [
            (info.num_instances, label) for info, label in zip(ready.info, ready.labels.tolist(), strict=True)
        ],
    }
    found = []
    for name, case in cases.items():
        taken = []
        for _ in range(5):
            before = time.perf_counter()
            case()
            taken.append(time.perf_counter() - before)
        found.append([name, f"{statistics.median(taken) * 1e6 / len(paths):,.2f}"])
    return found


def private_memory() -> float | None:
    """Return the MB that only this process holds, without mapped files; None if the system does not tell."""
    try:
        found = re.search(r"Private_Dirty:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    except OSError:
        return None
    return int(found[1]) / 1e3 if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=8)
    parser.add_argument("--patches", type=int, default=6000, help="per slide")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender")
    parser.add_argument("--folder", type=Path, help="where the files go, a temporary folder by default")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rng = np.random.default_rng(0)
    rows: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        for layout, write in LAYOUTS.items():
            folder = Path(name) / re.sub(r"\W+", "_", layout)
            (folder / "features").mkdir(parents=True)
            paths = [folder / "features" / f"S{number}.h5" for number in range(asked.slides)]
            for path in paths:
                features = rng.standard_normal((asked.patches, asked.dim), dtype=np.float32).astype(asked.dtype)
                write(path, features, rng.integers(0, 10**5, (asked.patches, 2)))
            megabytes = asked.slides * asked.patches * asked.dim * np.dtype(asked.dtype).itemsize / 1e6
            times = measure(paths, folder, asked.repeats)
            for contender, taken in times.items():
                cell = f"{megabytes / taken:,.0f} ({times[FIRST] / taken:.1f})"
                rows.setdefault(contender, [contender]).append(cell)
            print(".", end="", file=sys.stderr, flush=True)
        labels = label_pass(Path(name) / "labels", LABELLED)
    size = f"{asked.slides} slides of {asked.patches:,} x {asked.dim} {asked.dtype}"
    print(", ".join(["\n" + processor(), f"{asked.threads} threads", size, f"{asked.repeats} turns", *versions()]))
    print("\nMB/s, and in brackets the multiple of the first version's reader on the same files\n")
    print(table(" | ".join(["", *LAYOUTS]), list(rows.values())))
    print(f"\nLengths and labels of {LABELLED} small slides\n")
    print(table(" | ms per 1000 slides", labels))
    held = private_memory()
    if held is not None:
        print(f"\nPrivate memory of the process at its end: {held:,.0f} MB")


if __name__ == "__main__":
    main()
