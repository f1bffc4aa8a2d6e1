"""The text on the pictures of a prediction, from its record `<slide>_prediction.json`."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from utils.core.cohorts import SYNTHETIC
from utils.core.files import digest
from utils.core.text import percent_text
from utils.pictures.attention_map import UNIFORM, models_of, weight_name
from utils.pictures.faithfulness_text import doubts, verdict
from utils.tasks.records import Answer
from utils.tasks.task import Task

_RECIPE = (
    "backbone", "weights_digest", "patch_size", "stride", "level", "mpp", "tissue_threshold", "edge", "precision",
)  # fmt: skip
_DIGEST_LENGTH, _SHORT_LENGTH = 64, 16  # characters of a digest, and of its printed beginning


def prediction_title(record: Mapping[str, Any]) -> str:
    """Return the title of every picture of a prediction."""
    seen = ", seen in training" if record["seen_in_training"] else ""
    return f"{record['slide']}{_whose(record)}: {_answer(record)}{seen}"


def _whose(record: Mapping[str, Any]) -> str:
    """Return whose answer it is, if it is not the slide's own."""
    case = record.get("case")
    return f" (answer for all {len(case['slides'])} slides of patient {case['case_id']})" if case else ""


def _answer(record: Mapping[str, Any]) -> str:
    answer = Answer.of(record)
    if not answer.task.target_words:
        return "; ".join(filter(None, [answer.task.headline(answer.predicted), record.get(answer.task.decided_key)]))
    predicted, word = answer.predicted, f"{answer.task.answer_word}, " if answer.task.answer_word else ""
    counts = f", {answer.agreeing} of {len(answer.members)} models" if answer.members else ""
    calibrated, other = record.get("calibrated_probabilities"), _calibrated_class(record)
    if calibrated is None:
        return f"{predicted} ({word}{percent_text(record['confidence'])}{counts})"
    differing = "" if other == predicted else f"; {other} {percent_text(calibrated[other])}"
    return f"{predicted} ({percent_text(calibrated[predicted])} calibrated{counts}{differing})"


def _calibrated_class(record: Mapping[str, Any]) -> str | None:
    """Return the class of the highest calibrated probability; None without calibrated probabilities."""
    calibrated = record.get("calibrated_probabilities")
    return calibrated and max(calibrated, key=calibrated.__getitem__)


def _decision_notes(record: Mapping[str, Any]) -> list[str]:
    """Return that what was fitted to inner validation, temperatures or the threshold of a single checkpoint, by which
    its models vote, names another class than the probabilities.
    """
    answer = Answer.of(record)
    predicted, calibrated = answer.predicted, answer.calibrated
    if not calibrated:  # nothing was fitted to slides that were fed in this way
        return []
    used = f"The predicted class, {predicted}, is the one with the highest probability before calibration"
    other, models = max(calibrated, key=calibrated.__getitem__), record.get("models", [])
    if other != predicted:
        return [
            f"{used}; the calibrated probabilities differ: they are highest for {other} "
            f"({percent_text(calibrated[other])})."
        ]
    selection = models[0]["selection"] if len(models) == 1 else {}
    threshold, point = selection.get("threshold"), selection.get("operating_point", "")
    if threshold is None:
        return []
    negative, positive = record["probabilities"]
    aim = f" for {point.replace('_', ' ')}" if point else ""
    members = record.get("member_probabilities") or [record["probabilities"]]
    votes = sum(member[positive] >= threshold for member in members)
    decided = positive if votes > len(members) / 2 else negative
    if decided == predicted or votes == len(members) / 2:
        return []
    return [
        f"{used}; the model's own threshold ({threshold:.3g} for {positive}, fitted on inner validation{aim}) differs: "
        f"by it the slide is {decided}."
    ]


@dataclass(frozen=True)
class Caption:
    """The result of a prediction in one line; `probabilities` by class, calibrated ones if there are, or other shares
    of the task, with the `probability_title`; `facts` (pairs of a name and a text) on how it was made; `notes`, which
    are warnings; what `evidence` of the `quantity` adds up to, if there is any; and which probabilities are the answer,
    `marked`.
    """

    answer: str = ""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    evidence: str = ""
    probability_title: str = "probability"
    quantity: str = "log-odds"
    marked: Sequence[str] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Return the caption of a prediction's record."""
        answer = Answer.of(record)
        title, shown = answer.task.shares(answer.calibrated or answer.values)
        title = f"calibrated {title}" if answer.calibrated else title
        return cls(
            _answer(record) + _whose(record), shown, _facts(record), _notes(record), evidence_text(record), title,
            answer.task.quantity, answer.marked,
        )  # fmt: skip


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe, several = record["recipe"] or {}, isinstance(record["checkpoint"], list)
    models = models_of(record)
    checkpoints = record["checkpoint"] if several else [record["checkpoint"]]
    facts = [
        ("models, averaged" if several else "model", _with_counts(map(_settings_text, models))),
        ("checkpoints" if several else "checkpoint", _paths_text(checkpoints)),
        *([("answered", f"out of fold, by the model of fold {record['fold']}")] if "fold" in record else []),
        ("fed", _feed_text(record)),
        *_case_facts(record.get("case"), weight_name(record)),
    ]
    answer = Answer.of(record)
    facts += _decided_facts(record, answer.task)
    if answer.members:
        name = answer.output
        text = percent_text if name in answer.task.shares(answer.values)[1] else _number
        values, spread = ", ".join(text(member[name]) for member in answer.members), (answer.spread or {})[name]
        facts.append((f"{name} by each model", f"{values}; standard deviation {text(spread)}"))
    calibrated = answer.calibrated
    if calibrated is not None:
        text = (
            f"{percent_text(record['confidence'])} before, {percent_text(calibrated[record['predicted_class']])} after"
        )
        facts.append(("calibration", f"{text} ({_scaling_text(record, list(calibrated))})"))
    if record.get("evidence"):
        facts.append(("evidence", evidence_text(record)))
    elif "evidence" in record:  # asked for
        facts.append(
            ("evidence", f"no map: {no_evidence_reason(list(dict.fromkeys(model['name'] for model in models)))}")
        )
    facts += localization_facts(record.get("localization") or {"classes": {}})
    facts += _faithfulness_facts(record.get("faithfulness"), weight_name(record))
    delivered = (record["slide_record"] or {}).get("mpp_delivered")
    names = _RECIPE if delivered is None else [name for name in _RECIPE if name != "mpp"]
    facts += [(name, _short(str(recipe[name]))) for name in names if recipe.get(name) is not None]
    return facts if delivered is None else [*facts, ("µm/px of the patches", _mpp_text(delivered, recipe.get("mpp")))]


def _case_facts(case: Mapping[str, Any] | None, weights: str) -> list[tuple[str, str]]:
    """Return which slides of a patient were answered together, and how much of the weights this one has."""
    if case is None:
        return []
    share = "" if case["share"] is None else f"; of the {weights}, {percent_text(case['share'])} is on this slide"
    return [("patient", f"{case['case_id']}, all slides as one bag: {', '.join(case['slides'])}{share}")]


def _decided_facts(record: Mapping[str, Any], task: Task) -> list[tuple[str, str]]:
    """Return what was decided by what was fitted, and by which number; nothing if nothing was."""
    decided = record.get(task.decided_key)
    if not decided:
        return []
    selection = record["models"][0]["selection"]
    cuts = [f"{name.replace('_', ' ')} of inner validation {selection[name]:.4g}" for name in task.decision_figures]
    return [(task.decided_key.replace("_", " "), "; ".join([decided, *cuts]))]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _scaling_text(record: Mapping[str, Any], class_names: Sequence[str]) -> str:
    """Return what calibrated the probabilities, and which frequencies of two classes they refer to, if recorded."""
    several = isinstance(record["temperature"], list)
    temperatures = record["temperature"] if several else [record["temperature"]]
    text = f"temperature {', '.join(f'{temperature:.2f}' for temperature in temperatures)}"
    priors = (record.get("prior") or [None]) if several else [record.get("prior")]
    shares = " or ".join(dict.fromkeys(percent_text(prior[-1]) for prior in priors if prior and len(prior) == 2))
    if not shares:
        return text
    return f"{text}; for slides of which {shares} are {class_names[-1]}"


def _feed_text(record: Mapping[str, Any]) -> str:
    """Return how the slide was fed; a slide of one chunk was fed whole."""
    if record["mode"] != "chunked" or record.get("num_instances", math.inf) <= record["chunk_size"]:
        return "whole"
    return f"in chunks of {record['chunk_size']}, their probabilities averaged"


def _mpp_text(delivered: float, recipe_mpp: float | None) -> str:
    """Return the um/px at which patches were read, and that of the recipe if it is another one."""
    text = f"{delivered:.4g}"
    return text if recipe_mpp is None or f"{recipe_mpp:.4g}" == text else f"{text} (recipe: {recipe_mpp:.4g})"


def _notes(record: Mapping[str, Any]) -> list[str]:
    notes = []
    if record["seen_in_training"]:
        unit = "patient" if record.get("seen_as") == "case" else "slide"
        notes.append(f"The model was trained on this {unit}: its prediction is not independent evidence.")
    if record.get("dataset") == SYNTHETIC:
        notes.append("The model was trained on synthetic slides: its prediction means nothing for real tissue.")
    notes += _decision_notes(record)
    if record.get("faithfulness"):
        notes += doubts(Answer.of(record).predicted, record["faithfulness"], weight_name(record))
    return notes


def model_text(record: Mapping[str, Any]) -> str:
    """Return a short name of a record's models that tells them from others: their kinds and a digest of their weights;
    empty if the record does not say.
    """
    models = record.get("models", [])
    names = "+".join(dict.fromkeys(model["model"]["name"] for model in models))
    return f"{names} {digest(*(model['weights_digest'] for model in models))[:6]}" if models else ""


def _settings_text(model: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {_short(str(value))}" for name, value in model.items() if name != "name")
    return f"{model['name']} ({settings})"


def _with_counts(texts: Iterable[str]) -> str:
    """Return the different texts, each with its count."""
    return "; ".join(text if count == 1 else f"{count} x {text}" for text, count in Counter(texts).items())


def _paths_text(paths: Sequence[str]) -> str:
    """Return the paths, those in one folder together."""
    folders: dict[str, list[str]] = {}
    for path in map(Path, paths):
        folders.setdefault(str(path.parent), []).append(path.name)
    if len(paths) == 1:
        return paths[0]
    return "; ".join(f"{', '.join(names)} in {folder}" for folder, names in folders.items())


def _faithfulness_facts(measured: Mapping[str, Any] | None, weights: str) -> list[tuple[str, str]]:
    """Return the gaps of each map that has an order, and which map the answer bears out more."""
    if not measured:
        return []
    facts = []
    if weights != UNIFORM and measured["deletion"]["gap"] is not None:
        facts.append(("faithfulness", _gaps_text(weights, measured, measured["random_orders"])))
    evidence = measured.get("evidence")
    if evidence and evidence["deletion"]["gap"] is not None:
        facts.append(("faithfulness of evidence", _gaps_text("evidence", evidence, measured["random_orders"])))
    sentence = verdict(measured, weights)
    return (
        [*facts, ("faithfulness of both maps" if measured.get("borne_out_more") else "faithfulness", sentence)]
        if (sentence)
        else facts
    )


def _gaps_text(name: str, curves: Mapping[str, Any], orders: int) -> str:
    gaps = [
        f"{curve} gap by {name} {curves[curve]['gap']:+.3f} (beats {curves[curve]['random_orders_beaten']} of {orders})"
        for curve in ("deletion", "insertion")
    ]
    return f"mean probability against random orders: {', '.join(gaps)}"


def localization_facts(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how well the maps find the patches annotated as each class."""
    facts = [("annotations", f"not scored: {entry['reason']}")] if entry.get("reason") else []
    for name, scores in entry["classes"].items():
        maps = [_map_text(kind, scores[kind]) for kind in ("attention", "evidence") if scores.get(kind)]
        texts = [f"{scores['patches']:,} of {scores['of']:,} patches", *filter(None, maps)]
        facts.append((f"annotated {name}", "; ".join(texts)))
    return facts


def _map_text(kind: str, scores: Mapping[str, float | None]) -> str:
    if scores["auc"] is None:
        return ""
    pointing = {0.0: "no", 1.0: "yes"}.get(scores["pointing"] or 0.0, f"{scores['pointing']:.0%} of tied ones")
    return f"{kind} AUC {scores['auc']:.3f}, top patch in it: {pointing}, overlap {scores['overlap']:.3f}"


def evidence_text(record: Mapping[str, Any]) -> str:
    """Return what the log-odds of the predicted class, or another signal, are the sum of; empty without evidence."""
    if not record.get("evidence"):
        return ""
    answer, evidence = Answer.of(record), record["evidence"]
    name, task = answer.signal, answer.task
    log_odds, start, favourable, adverse = (
        evidence[term][name] for term in (task.quantity_key, "reference", "for", "against")
    )
    largest = max(map(abs, (log_odds, start, favourable, adverse)))
    decimals = max(0, 3 - math.floor(math.log10(largest))) if largest > 0 else 3  # the same, so that they add up
    total, begin, gain, loss = (f"{value:+.{decimals}f}" for value in (log_odds, start, favourable, adverse))
    others = evidence.get("other_slides")
    rest = "" if others is None else f", the patient's other slides {others[name]:+.{decimals}f}"
    return (
        f"{task.quantity} of {name} {total}: {evidence['begins_at']} {begin}, patches for it {gain}, patches against "
        f"it {loss}{rest}"
    )


def no_evidence_reason(names: Sequence[str]) -> str:
    """Return why models of these names, or some of them, give no evidence."""
    if "TransMIL" in names:
        return "TransMIL mixes the patches by self-attention, so that a patch's share of the log-odds is not defined"
    return f"{', '.join(names)} does not say what each patch adds to the log-odds"


def _short(text: str) -> str:
    return text[:_SHORT_LENGTH] if len(text) == _DIGEST_LENGTH else text
