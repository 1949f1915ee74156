"""A student: the pruned teacher, taught by the teacher's targets."""

import copy
import json
from pathlib import Path
from typing import Any

from tasks.distill.objective import distillation
from tasks.frame import events, jsonl
from tasks.frame.stage import read_json, write_json
from tasks.learning.accuracy_test import AccuracyTest
from tasks.learning.targets import ORDER, read_targets
from tasks.learning.training import cross_entropy, train
from tasks.models import loading
from tasks.models.chat import encoded_split, read_encoded
from tasks.params import Params


def distill(
    params: Params, *, source: Path, taught: Path, pruned: Path, seed: int, out: Path, scratch: Path
) -> dict[str, float]:
    """Train one student, and let it take the test. The seed decides which rows it reads and in what order.

    Writes `model/`, `history.json`, `models.json` (of all models before quantization) and `predictions.jsonl` (the
    teacher's answers and the student's, to each test row).

    Raises:
        StageError: the loss is not finite, or the disk is full.
    """
    settings, task = params.distill, params.task
    order = seed ^ ORDER
    events.doing("load libraries and rows")
    tokenizer = loading.load_tokenizer(pruned / "model")
    test = AccuracyTest(tokenizer, loading.stop_ids(pruned / "model", tokenizer), task, source)
    validation = encoded_split(tokenizer, source, "validation", task.max_length)
    rows = encoded_split(tokenizer, source, "train", task.max_length) + read_encoded(taught / "answered.jsonl")
    models: dict[str, Any] = {**read_json(taught / "models.json"), **read_json(pruned / "models.json")}

    dtype = loading.arithmetic(settings.precision)
    events.doing("load the pruned model")
    model = loading.load_model(pruned / "model", dtype)
    if settings.control:
        control = copy.deepcopy(model)
        plain = cross_entropy(control)
        train(control, rows, validation, settings, plain, scratch, "control", seed=order)
        models["control"] = test.take("control", control).facts
    lookup = read_targets(taught / "targets.safetensors", model.device)
    objective = distillation(model, lookup, settings, params.teach.temperature)
    history = train(model, rows, validation, settings, objective, scratch, "distill", seed=order)
    events.doing("save the student")
    loading.save(model, tokenizer, out / "model")
    (out / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    events.doing("load the student")
    taken = test.take("distilled", loading.load_model(out / "model", dtype))
    models["distilled"] = taken.facts
    write_json(out / "models.json", models)
    lines = zip(jsonl.read(taught / "answers.jsonl"), taken.answers, taken.correct, strict=True)
    jsonl.write(out / "predictions.jsonl", (line | {"student": a, "student_correct": c} for line, a, c in lines))
    teacher, student, base = models["teacher"], models["distilled"], models["base"]["accuracy"]
    gap = teacher["accuracy"] - base
    return {
        "accuracy": student["accuracy"],
        "retention": student["accuracy"] / teacher["accuracy"] if teacher["accuracy"] else 0.0,
        "closed": (student["accuracy"] - base) / gap if gap else 0.0,
        "parameters": student["parameters"],
        "parameters_ratio": student["parameters"] / teacher["parameters"],
        "validation_loss": min(entry["validation_loss"] for entry in history),
    }
