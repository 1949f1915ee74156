"""The teacher speaks once: it takes the test, answers unlabelled prompts, and its targets are kept for all students."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

from tasks.frame import events, jsonl
from tasks.frame.stage import write_json
from tasks.learning.accuracy_test import SAMPLE, AccuracyTest
from tasks.learning.generation import continued
from tasks.learning.targets import ORDER, write_targets
from tasks.learning.training import batches
from tasks.models import loading
from tasks.models.chat import Encoded, encoded_split, end_of_turn, prompt_ids, read_rows, write_encoded
from tasks.params import Params


def teach(params: Params, *, source: Path, teacher: Path, out: Path, scratch: Path) -> dict[str, float]:
    """Write `models.json` (the model as acquired, and the teacher), `answers.jsonl` (the teacher's, to each test row),
    `answered.jsonl` (unlabelled prompts with the teacher's answers, as token ids) and `targets.safetensors` (of the rows
    that a student of each seed will read).

    Raises:
        ArtifactError: teacher and source disagree about the vocabulary.
        DiskFullError: the targets do not fit.
    """
    task = params.task
    events.doing("load libraries and rows")
    tokenizer = loading.load_tokenizer(teacher / "model")
    loading.check_same_vocabulary(teacher / "model", source / "model")
    stops = loading.stop_ids(teacher / "model", tokenizer)
    test = AccuracyTest(tokenizer, stops, task, source)
    rows = encoded_split(tokenizer, source, "train", task.max_length)

    dtype = loading.arithmetic(params.distill.precision)
    events.doing("load the teacher")
    model = loading.load_model(teacher / "model", dtype)
    taken = test.take("teacher", model)
    answered = _answered(model, tokenizer, source, stops, params, scratch)
    rows += answered
    write_encoded(out / "answered.jsonl", answered)
    write_targets(
        model, rows, _read_by_students(rows, params), out / "targets.safetensors",
        top_k=params.teach.top_k, temperature=params.teach.temperature,
    )  # fmt: skip
    del model
    events.doing("load the base model")
    base = test.take("base", loading.load_model(source / "model", dtype), SAMPLE)
    write_json(out / "models.json", {"base": base.facts, "teacher": taken.facts})
    lines = zip(test.references, taken.answers, taken.correct, strict=True)
    jsonl.write(out / "answers.jsonl", ({"reference": r, "teacher": a, "teacher_correct": c} for r, a, c in lines))
    return {
        "base_accuracy": base.facts["accuracy"],
        "accuracy": taken.facts["accuracy"],
        "answered_rows": float(len(answered)),
    }


def _read_by_students(rows: list[Encoded], params: Params) -> set[int]:
    """Indices of the rows that training will read with one of the seeds."""
    settings, lengths = params.distill, [len(row.ids) for row in rows]
    steps = (
        batches(lengths, settings.batch_tokens, seed ^ ORDER, settings.passes(len(rows)))
        for seed in params.select.seeds
    )
    return set(chain.from_iterable(chain.from_iterable(steps)))


def _answered(
    model: Any, tokenizer: Any, source: Path, stops: list[int], params: Params, scratch: Path
) -> list[Encoded]:
    """Unlabelled prompts with the teacher's greedy answers (sequence-level distillation, Kim and Rush, 2016)."""
    path, wanted = source / "data" / "unlabelled.jsonl", params.teach.unlabelled_rows
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
