"""The student: the teacher without its least important blocks and channels, taught by the teacher's own targets."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

from tasks.distill.pruning import prune
from tasks.distill.targets import cache_targets, distillation
from tasks.frame import events, jsonl
from tasks.learning.generation import answers, continued
from tasks.learning.training import cross_entropy, train
from tasks.models import loading
from tasks.models.chat import Encoded, Messages, encode_all, end_of_turn, prompt_ids, read_rows
from tasks.models.scoring import Metric, accuracy, judged, per_group
from tasks.models.scoring import load as load_metric
from tasks.params import Params

SAMPLE = 400  # test rows that tell what the model was as acquired, and pruned: no verdict rests on them
# The student reads rows in another order than a teacher of the same seed, so that where an epoch is not read to its end
# most of its rows are new to the teacher, which is less certain of them and so says more.
ORDER = 0x5EED


def distill(params: Params, *, source: Path, teacher: Path, seed: int, out: Path, scratch: Path) -> dict[str, float]:
    """Prune the teacher, train a student on cached teacher targets, and judge all models on the test split.

    Writes `model/`, `models.json`, `predictions.jsonl`, `history.json` and `pruning.json`.

    Raises:
        ArtifactError: teacher and source disagree about the vocabulary.
        StageError: the loss is not finite, or the disk is full.
    """
    settings, task = params.distill, params.task
    order = seed ^ ORDER
    events.doing("load libraries and rows")
    tokenizer = loading.load_tokenizer(teacher / "model")
    loading.check_same_vocabulary(teacher / "model", source / "model")
    splits = {name: read_rows(source / "data" / f"{name}.jsonl") for name in ("train", "validation", "test")}
    encoded = {name: encode_all(tokenizer, rows, task.max_length) for name, rows in splits.items()}
    judge = _Judge(
        tokenizer,
        splits["test"],
        encoded["test"],
        loading.stop_ids(teacher / "model", tokenizer),
        params,
        load_metric(task.metric, source),
    )

    dtype = loading.arithmetic(settings.precision)
    events.doing("load the teacher")
    model = loading.load_model(teacher / "model", dtype)
    judge.add("teacher", model)
    rows = encoded["train"] + _answered(model, tokenizer, source, judge.stops, params, scratch)
    lookup = cache_targets(model, rows, settings, scratch / "targets.safetensors", order)
    # Which blocks to do without is a choice, so it is made on rows that the teacher did not learn.
    calibration = _spread(encoded["validation"], settings.calibration_rows)
    removed = prune(model, calibration, _spread(rows, settings.fitted_rows), settings, scratch / "pruning.json")
    (out / "pruning.json").write_text(json.dumps(removed, indent=1) + "\n")
    judge.add("pruned", model, SAMPLE)
    if settings.control:
        control = copy.deepcopy(model)
        plain = cross_entropy(control)
        train(control, rows, encoded["validation"], settings, plain, scratch, "control", seed=order)
        judge.add("control", control)
    objective = distillation(model, lookup, settings)
    history = train(model, rows, encoded["validation"], settings, objective, scratch, "distill", seed=order)
    events.doing("save the student")
    loading.save(model, tokenizer, out / "model")
    (out / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    events.doing("load the student")
    judge.add("distilled", loading.load_model(out / "model", dtype))
    events.doing("load the base model")
    judge.add("base", loading.load_model(source / "model", dtype), SAMPLE)
    judge.write(out)
    teacher_facts, student = judge.models["teacher"], judge.models["distilled"]
    base = judge.models["base"]["accuracy"]
    gap = teacher_facts["accuracy"] - base
    return {
        "teacher_accuracy": teacher_facts["accuracy"],
        "pruned_accuracy": judge.models["pruned"]["accuracy"],
        "accuracy": student["accuracy"],
        "retention": student["accuracy"] / teacher_facts["accuracy"] if teacher_facts["accuracy"] else 0.0,
        "closed": (student["accuracy"] - base) / gap if gap else 0.0,
        "parameters": student["parameters"],
        "parameters_ratio": student["parameters"] / teacher_facts["parameters"],
        "validation_loss": min(entry["validation_loss"] for entry in history),
    }


def _spread(rows: list[Encoded], count: int) -> list[Encoded]:
    """At most `count` rows, evenly spread."""
    return rows[:: max(1, len(rows) // count)][:count] if count else []


class _Judge:
    """Every model's answers on the one test split, with their accuracy, size and classes."""

    def __init__(
        self,
        tokenizer: Any,
        test: list[Messages],
        encoded: list[Encoded],
        stops: list[int],
        params: Params,
        metric: Metric,
    ) -> None:
        self.tokenizer, self.encoded, self.stops, self.task, self.metric = (
            tokenizer,
            encoded,
            stops,
            params.task,
            metric,
        )
        self.references = [row[-1]["content"] for row in test]
        self.answers: dict[str, list[str]] = {}
        self.correct: dict[str, list[bool]] = {}
        self.models: dict[str, dict[str, Any]] = {}

    def add(self, name: str, model: Any, most: int = sys.maxsize) -> None:
        """Let a model answer the test split, or `most` of its rows, evenly spread."""
        total = len(self.references)
        chosen = [i * total // most for i in range(most)] if most < total else list(range(total))
        references = [self.references[i] for i in chosen]
        said = answers(
            model,
            self.tokenizer,
            [self.encoded[i] for i in chosen],
            references,
            self.stops,
            self.task.max_new_tokens,
            self.metric,
            f"test {name}",
        )
        correct = judged(self.metric, said, references, "test.jsonl")
        self.answers[name], self.correct[name] = said, correct
        self.models[name] = {
            "accuracy": accuracy(correct),
            "rows": len(chosen),
            "parameters": loading.count(model),
            "layers": model.config.num_hidden_layers,
            "per_group": per_group(references, correct),
        }
        events.note(f"{name}: accuracy {accuracy(correct):.3f}, {loading.count(model) / 1e6:.1f} M parameters")

    def write(self, out: Path) -> None:
        """`models.json` and `predictions.jsonl`."""
        (out / "models.json").write_text(json.dumps(self.models, indent=1, sort_keys=True) + "\n")
        rows = (
            {
                "reference": reference,
                "teacher": self.answers["teacher"][i],
                "student": self.answers["distilled"][i],
                "teacher_correct": self.correct["teacher"][i],
                "student_correct": self.correct["distilled"][i],
            }
            for i, reference in enumerate(self.references)
        )
        jsonl.write(out / "predictions.jsonl", rows)


def _answered(
    model: Any, tokenizer: Any, source: Path, stops: list[int], params: Params, scratch: Path
) -> list[Encoded]:
    """Unlabelled prompts with the teacher's greedy answers (sequence-level distillation, Kim and Rush, 2016)."""
    path, wanted = source / "data" / "unlabelled.jsonl", params.distill.unlabelled_rows
    if not wanted or not path.is_file():
        return []
    prompts = dict(enumerate(prompt_ids(tokenizer, row) for row in read_rows(path)[:wanted]))
    cached = scratch / "answered.json"
    if cached.is_file():
        made = {int(i): ids for i, ids in json.loads(cached.read_text()).items()}
    else:
        with events.progress("teacher answers", len(prompts), "rows") as advance:
            lengths = {i: len(ids) for i, ids in prompts.items()}
            made = continued(model, prompts, stops, lengths, params.task.max_new_tokens, advance)
        cached.with_suffix(".new").write_text(json.dumps(made))
        cached.with_suffix(".new").rename(cached)
    rows = []
    for i, prompt in prompts.items():
        answer = made[i][len(prompt) :]
        # An answer that ran into the limit has no end: teaching it would teach never to stop.
        if 0 < len(answer) < params.task.max_new_tokens and len(made[i]) < params.task.max_length:
            ids = [*made[i], end_of_turn(tokenizer)]
            rows.append(Encoded(ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt))))
    return rows
