"""Run `predict.py`: predict a slide or a folder of slides, draw pictures, write the tables and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.bags.labels import LabelRow
from utils.core import cli
from utils.core.cohorts import SYNTHETIC
from utils.core.device import amp_dtype, resolve_device
from utils.core.engine import Threads, open_engine
from utils.core.errors import ConfigError, first_few, plural
from utils.core.files import clear_parts, read_json, read_record, wait_for_file
from utils.core.ray_settings import Cluster
from utils.core.recipe import ASKED_FIELDS
from utils.core.runtime import log
from utils.core.text import NOTICE
from utils.pictures.index_page import INDEX, IndexRow, write_index
from utils.pictures.prediction_caption import localization_facts, no_evidence_reason, prediction_title
from utils.prediction.annotations import Annotations
from utils.prediction.existing_records import ENDING, check_settings, has_settings
from utils.prediction.inputs import DEFAULT_FOLDER, PredictionFiles
from utils.prediction.prediction_table import REPORT, PredictedSlides, SlideInfo, earlier_slides
from utils.prediction.predictor import SlidePredictor, extractPredict, flags_recipe
from utils.prediction.settings import Prediction, PredictionRecipe
from utils.prediction.slide_prediction import SEEN
from utils.prediction.slide_worker import Predictors, SlideWorker
from utils.prediction.trained_model import BY_NAME, compares_content, model_name, seen_words, warn_of_spelling
from utils.slides.batch import work_through
from utils.slides.slide_mpps import SlideMpps
from utils.slides.slide_status import STATUSES, SlideStatus
from utils.tasks.records import Answer
from utils.tasks.task import Task

if TYPE_CHECKING:  # it imports what draws
    from utils.prediction.prediction_pictures import PredictionPictures

_ONLY_RAW = ("save_features", "weights", "slides_csv", "slide_mpp")


def make_predictors(files: PredictionFiles, recipe: PredictionRecipe) -> Predictors:
    """Return the predictor of the checkpoints or, out of fold, that of each fold.

    Raises ConfigError for settings that go with raw slides only, and what SlidePredictor and extractPredict raise.
    """
    run, settings = files.run, files.settings
    if settings.mil is not None:
        model_name(settings.mil)  # other people's code runs because it is named here
    if run is None:
        return Predictors([_make_predictor(settings, recipe, files.are_raw, settings.checkpoint)])
    fold_of = {source.stem: run.slides[source.stem].fold for source in files.sources}
    folds = sorted(set(fold_of.values()))
    predictors = [_make_predictor(settings, recipe, files.are_raw, (run.checkpoint(fold),)) for fold in folds]
    return Predictors(predictors, {slide: folds.index(fold) for slide, fold in fold_of.items()})


def _make_predictor(
    settings: Prediction, recipe: PredictionRecipe, are_raw: bool, checkpoints: Sequence[Path]
) -> SlidePredictor:
    """Return the predictor of some checkpoints, with a feature extractor if the inputs are raw slides."""
    arguments: dict[str, Any] = {
        name: getattr(settings, name) for name in ("device", "dataset", "num_heads", "allow_mismatch")
    }
    if are_raw:
        arguments |= {name: getattr(recipe, name) for name in (*ASKED_FIELDS, "weights", "batch_size")}
        predictor = extractPredict(checkpoints, **arguments)
    else:
        unused = [f"--{name}" for name in _ONLY_RAW if getattr(recipe, name)]
        if unused:
            inputs = settings.input or settings.input_dir or settings.out_of_fold
            raise ConfigError(f"{inputs}: holds features already; {' and '.join(unused)} goes with raw slides")
        predictor = SlidePredictor(checkpoints, **arguments)
        flags, recorded = flags_recipe(recipe), predictor.checkpoint.recipe
        if recorded is not None and recorded.mpp is not None:
            flags = replace(flags, level=None)  # it gives the size of the patches to draw, in a file that lacks it
        predictor.require(recipe=flags)
    amp_dtype(settings.precision, predictor.device)  # refuses what the device lacks
    predictor.precision = settings.precision
    predictor.require(mil=settings.mil, input_dim=settings.input_dim)
    if settings.prevalence is not None:
        predictor.trained = [model.at_prevalence(settings.prevalence) for model in predictor.trained]
    if predictor.feed(settings.mode, settings.chunk_size).mode == "full" and settings.chunk_size is not None:
        raise ConfigError("--chunk_size has no meaning in full mode; give --mode chunked with it")
    feed = predictor.feed(settings.mode, settings.chunk_size)
    if settings.prevalence is not None and any(model.fitted_to(feed) is None for model in predictor.trained):
        raise ConfigError(
            "--prevalence: only slides fed as in training are calibrated; leave --mode and --chunk_size out"
        )
    return predictor


def output_folder(files: PredictionFiles, predictors: Predictors) -> Path:
    """Return the output folder: the one given, else one named after the model, and after its run or its data set."""
    run = "" if files.run is None else files.run.folder.resolve().name
    name = predictors.folder_name(run) + ("_out_of_fold" if run else "")
    return files.settings.output_dir or DEFAULT_FOLDER / name


def predict_files(
    predictors: Predictors,
    files: PredictionFiles,
    recipe: PredictionRecipe,
    drawing: PredictionPictures | None = None,
    cluster: Cluster | None = None,
) -> tuple[list[SlideStatus], str]:
    """Predict a slide or a folder of slides; keep predictions that exist, and continue past a slide that fails.

    Each prediction is a file. For a folder there are also a table, an index page, a report and, with labels, scores and
    their figures. Returns the status of each slide and the closing words. Raises if a single slide fails.
    """
    settings, folder, cluster = files.settings, output_folder(files, predictors), cluster or Cluster()
    needing = {"--visualize": drawing is not None, "--faithfulness": settings.faithfulness}
    needing["--annotations"] = settings.annotations is not None
    _check_attention(predictors, needing)
    silent = [name for predictor in predictors.each for name in predictor.models_without_evidence()]
    for note in dict.fromkeys(note for predictor in predictors.each for note in predictor.notes()):
        log.info(note)
    if silent and any(needing.values()):
        log.info("There is no evidence map: %s", no_evidence_reason(list(dict.fromkeys(silent))))
    first = predictors.first.checkpoint
    if predictors.first.feed(settings.mode, settings.chunk_size).unit == "case":
        _join_cases(files, predictors)
    elif settings.cases_csv is not None:
        raise ConfigError(
            f"--cases_csv {settings.cases_csv}: {predictors.first.path} answers for each slide; leave it out, or train "
            "with --unit case"
        )
    rows = files.label_rows(first.task, settings.dataset or first.dataset)
    if settings.labels_csv is not None:
        warn_of_spelling(predictors.first.trained, (row.case_id for row in rows.values()), settings.labels_csv)
    infos = earlier_slides(folder, first.task.columns) | _slide_infos(files, first.task, rows)
    mpps = SlideMpps.read(recipe.slides_csv, recipe.slide_mpp)
    mpps.check(files.sources, settings.input or Path(str(settings.input_dir)))
    annotations = _annotations(predictors, files, recipe)
    worker = SlideWorker(predictors, files, recipe, drawing, infos, mpps, annotations)
    if settings.input is None:
        return _predict_folder(worker, folder, rows, cluster)
    if cluster.is_asked_for:
        raise ConfigError("--ray distributes the slides of a folder; give --input_dir with it")
    return _predict_slide(worker, settings.input, files.targets(folder)[settings.input])


def _join_cases(files: PredictionFiles, predictors: Predictors) -> None:
    """Take all slides of a patient as one bag, as the models were trained to."""
    about = f"{predictors.first.path} predicts patients, each a bag of all slides (--unit case)"
    if files.settings.faithfulness:
        raise ConfigError(f"--faithfulness: measures the answer for one slide, and {about}; leave it out")
    files.join_cases(about)


def _slide_infos(files: PredictionFiles, task: Task, rows: Mapping[str, LabelRow]) -> dict[str, SlideInfo]:
    """Return the patients and labels of the slides in the label table and in the training run."""
    infos = {source.stem: SlideInfo(case) for source, case in files.case_names.items()}
    if rows:
        targets = np.array([row.label for row in rows.values()])
        told = zip(rows.items(), task.target_text(targets), task.label_cells(targets), strict=True)
        infos |= {slide: SlideInfo(row.case_id, str(text), cells) for (slide, row), text, cells in told}
    if files.run is not None:
        infos |= {slide: SlideInfo(test.case_id, test.label, test.cells) for slide, test in files.run.slides.items()}
    return infos


def _annotations(predictors: Predictors, files: PredictionFiles, recipe: PredictionRecipe) -> Annotations | None:
    """Return what maps are scored against, if anything; warn of its files that match no slide."""
    settings = files.settings
    if settings.annotations is None:
        return None
    annotations = Annotations(
        settings.annotations, settings.annotation_class, predictors.first.task, recipe,
        feat_type=files.feat_type, is_folder=settings.input is None,
    )  # fmt: skip
    annotations.log_unused(files.sources)
    return annotations


def _check_attention(predictors: Predictors, flags: Mapping[str, bool]) -> None:
    """Raise ConfigError if a flag that is given needs attention, or classes, and a model has none."""
    task = predictors.first.task
    if flags["--faithfulness"] and not task.target_words:
        raise ConfigError(
            f"--faithfulness: measures how a class's probability falls, and {predictors.first.path} predicts no class "
            f"({task.about}); leave it out"
        )
    given = [flag for flag, is_given in flags.items() if is_given]
    for predictor in predictors.each if given else []:
        if predictor.gives_attention():
            continue
        # Evidence can be drawn in its place.
        names = [flag for flag in given if flag != "--visualize" or predictor.models_without_evidence()]
        if names:
            raise ConfigError(f"{predictor.path}: its model gives no attention; leave {' and '.join(names)} out")


def _predict_slide(worker: SlideWorker, source: Path, target: Path) -> tuple[list[SlideStatus], str]:
    status = worker(source, target)
    record = read_json(target)
    if record["seen_as"]:
        log.warning(SEEN, source, seen_words(record["seen_as"], record.get("seen_compared")))
    elif record["seen_as"] == "" and record.get("seen_compared") == "name":
        log.info("%s: %s", source, BY_NAME)
    if worker.annotations is not None and record["localization"] is None:
        log.warning("%s: %s has no annotations of this slide, so no map is scored", source, worker.annotations.source)
    lines = [
        prediction_title(record),
        *_localization_lines(record),
        *(f"  {path}" for path in [*worker.output_files(record, target.parent), target]),
    ]
    if source.stem in earlier_slides(target.parent):  # update its row in the folder's table and index page
        lines += _conclude(worker, target.parent, [target], {}, failed=0)
    return [status], "\n".join([*lines, f"{NOTICE} (took {cli.took()})", f"Next: {_next_step(worker)}"])


def _localization_lines(record: Mapping[str, Any]) -> list[str]:
    """Return the lines on how well the maps find what is annotated; none without annotations."""
    return [f"  {name}: {text}" for name, text in localization_facts(record.get("localization") or {"classes": {}})]


def _predict_folder(
    worker: SlideWorker, folder: Path, rows: Mapping[str, LabelRow], cluster: Cluster
) -> tuple[list[SlideStatus], str]:
    predictors, targets = worker.predictors, worker.files.targets(folder)
    # Errors that are not specific to one slide come before the first one: a missing backbone, another model's records.
    if predictors.first.feature_extractor is not None and not cluster.is_asked_for:
        _ = predictors.first.feature_extractor.backbone
    clear_parts(folder)
    if not worker.files.settings.overwrite:
        for number, settings in enumerate(worker.all_settings):
            own = [path for source, path in targets.items() if predictors.number(source.stem) == number]
            check_settings(own, settings)
    with open_engine(cluster, Threads(), str(resolve_device(worker.files.settings.device))) as engine:
        statuses = work_through(targets, engine, worker, folder / REPORT)
    counts = ", ".join(f"{sum(status.status == name for status in statuses)} {name}" for name in STATUSES)
    predicted = [targets[status.slide] for status in statuses if status.is_made]
    words = _conclude(worker, folder, predicted, rows, failed=len(statuses) - len(predicted)) if predicted else []
    words.append(f"{counts}; results are in {folder} (took {cli.took()})")
    if predicted:
        words += [NOTICE, f"Next: look at {folder / INDEX}; {_next_step(worker)}"]
    return statuses, "\n".join(words)


def _next_step(worker: SlideWorker) -> str:
    """Return a suggestion of what to do next."""
    settings = worker.files.settings
    if worker.drawing is None:
        wsi = "" if worker.files.are_raw else " --wsi SLIDE" if settings.input else " --wsi SLIDES_DIR"
        return f"the same command with --visualize{wsi} draws what the model attended to"
    first = worker.predictors.first
    has_measure = first.task.target_words and not worker.files.case_names and first.gives_attention()
    if not settings.faithfulness and has_measure:
        return "the same command with --faithfulness measures whether the attention matters"
    return "compare the maps with what you know of the slides"


def _conclude(
    worker: SlideWorker, folder: Path, targets: Sequence[Path], rows: Mapping[str, LabelRow], failed: int
) -> list[str]:
    """Write the table, scores and index page of a folder: of the predictions at `targets`, and of earlier ones with the
    same settings. Return the closing words.
    """
    files, settings = worker.files, worker.files.settings
    records = [read_json(wait_for_file(path)) for path in targets]
    earlier = [read_record(path) for path in sorted(set(folder.glob(f"*{ENDING}")) - set(targets))]
    earlier = [record for record in earlier if has_settings(record, worker.settings_of(str(record.get("slide"))))]
    all_records = sorted([*records, *earlier], key=lambda record: record["slide"])
    task = worker.predictors.first.checkpoint.task
    slides = PredictedSlides(all_records, rows, task, worker.infos, files.patients_from, files.groups, files.subgroups)
    first_settings, formats = worker.all_settings[0], settings.figure_format
    words = [slides.write(folder, worker.fitted, first_settings, settings.overwrite, formats)]
    notes = _notes(worker) + ([f"{plural(failed, 'slide')} without an answer: see {REPORT}."] if failed else [])
    write_index(folder / INDEX, [_index_row(record, slides, folder) for record in all_records], notes)
    if files.run is not None:
        words.append(_out_of_fold_words(files, records))
    refused = [record["slide"] for record in records if (record.get("localization") or {}).get("reason")]
    if worker.annotations is not None and refused:
        words.append(f"{plural(len(refused), 'slide')} without scores of maps: {first_few(refused)}; see {REPORT}.")
    if earlier:
        words.append(f"With {plural(len(earlier), 'slide')} of earlier commands in {folder}.")
    return [text for text in words if text]


def _out_of_fold_words(files: PredictionFiles, records: Sequence[Mapping[str, Any]]) -> str:
    run, settings = files.run, files.settings
    assert run is not None  # noqa: S101 - for the type checker: only called with a run
    text = f"Each slide is predicted by the model of the fold of {run.folder} that did not see it"
    if run.repeats > 1 and settings.repeat is None:
        text += f", in the first of {run.repeats} repeats (--repeat takes another)"
    if settings.mode or settings.chunk_size:
        return f"{text}; fed in another way than there, so not compared."
    return f"{text}. {run.agreement(records)}"


def _index_row(record: Mapping[str, Any], slides: PredictedSlides, folder: Path) -> IndexRow:
    """Return a slide's row on the index page, with its page and the picture of its map if they exist."""
    answer = Answer.of(record)
    slide, info = record["slide"], slides.infos.get(record["slide"], SlideInfo())
    files = [name for name in (record.get("pictures") or {}).get("files", []) if (folder / name).is_file()]
    pages = [name for name in files if name == f"{slide}_report.html"]
    pictures = [folder / name for name in files if name in (f"{slide}_thumbnail.jpg", f"{slide}_heatmap.png")]
    return IndexRow(
        slide, answer.predicted, answer.values, record["num_instances"],
        (pages or [f"{slide}{ENDING}"])[0], info.label, info.case_id, record["seen_in_training"], record.get("fold"),
        pictures[-1] if pictures else None, answer.calibrated, bool(answer.task.target_words),
    )  # fmt: skip


def _notes(worker: SlideWorker) -> list[str]:
    """Return the notes of the index page: the models, and whether they were trained on synthetic slides."""
    run, trained = worker.files.run, [model for each in worker.predictors.each for model in each.trained]
    names = ", ".join(dict.fromkeys(model.checkpoint.model["name"] for model in trained))
    if run is not None:
        notes = [f"{names} of {run.folder}, each slide by the model of the fold that did not see it."]
    else:
        paths = first_few([str(model.path) for model in trained], 3)
        notes = [f"{names} ({paths})" + (", whose predictions are averaged." if trained[1:] else ".")]
    if any(model.checkpoint.dataset == SYNTHETIC for model in trained):
        notes.append("Trained on synthetic slides: the prediction means nothing for real tissue.")
    if not all(compares_content(predictor.trained) for predictor in worker.predictors.each):
        notes.append(f"Seen in training: {BY_NAME}.")
    return notes
