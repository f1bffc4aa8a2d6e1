"""Write the results of a cross-validation: its tables, figures and `outputs.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.bags.dataset import MILDataset
from utils.core.files import write_json
from utils.evaluation import outputs
from utils.learning import inner_predictions, run_figures
from utils.learning.fold_results import FoldResult, pooled_predictions


def write_results(
    folder: Path,
    folds: Sequence[FoldResult],
    data: MILDataset,
    about: Mapping[str, Any],
    seed: int,
    formats: Sequence[str],
) -> None:
    """Write the tables, the figures in each of the `formats`, and `outputs.json`, which begins with the entries of
    `about`. `seed` draws the patients of the intervals.
    """
    predictions = pooled_predictions(folds, data, seed)
    outputs.write_table(folder / "predictions.csv", predictions.table())
    cases = predictions.by_case()
    if len(cases) < len(predictions):
        outputs.write_table(folder / "predictions_cases.csv", cases.table().drop(columns="wsi_id"))
    outputs.write_table(folder / "gallery.csv", outputs.gallery_table(predictions))
    history = pd.DataFrame([row for fold in folds for row in fold.history])
    outputs.write_table(folder / "history.csv", history)
    outputs.write_table(folder / inner_predictions.FILE, inner_predictions.inner_table(folds, data))
    monitors = {fold.fold.number: fold.selection["monitor"] for fold in folds}
    run_figures.draw_figures(folder, predictions, history, monitors, formats)
    figures = [fold.figures(data) for fold in folds]
    content = {**about, "unit": data.unit, **outputs.outputs_content(predictions, figures, data.patients_from)}
    content["n_slides"] = data.num_slides(np.unique(np.concatenate([fold.fold.test for fold in folds])))
    write_json(folder / "outputs.json", content)
