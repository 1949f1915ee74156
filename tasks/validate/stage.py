"""Validate: the shipped file itself, in its own runtime, against the teacher and the F16 student.

Quality (accuracy, perplexity, KLD) is the same on every run and goes into metrics.json; speed and memory
are measured in a process of their own and go into measurements.json. Whether that is good enough, `judge` says.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.errors import ArtifactError
from tasks.frame import jsonl
from tasks.frame.cores import busy, quiet, threads
from tasks.frame.events import doing, progress
from tasks.frame.stage import require_file, write_json
from tasks.models import chat, loading, scoring
from tasks.params import Params
from tasks.runtimes import llama
from tasks.runtimes.protocol import RuntimeModule
from tasks.validate import likelihood
from tasks.validate.measure import measure
from tasks.variants import VARIANTS


def validate(
    params: Params, *, source: Path, distilled: Path, converted: Path, artifact: Path, variant: str, out: Path
) -> dict[str, float]:
    """Write metrics.json, measurements.json and predictions.jsonl into `out`; return the metrics.

    Raises:
        ArtifactError: an input is missing, or the teacher's predictions are of other test rows.
        ConfigError: the text for perplexity is too short.
        StageError: a runtime fails.
    """
    runtime = VARIANTS[variant].runtime
    file = VARIANTS[variant].weights(artifact)
    if not file.exists():
        raise ArtifactError(f"{file} is missing: run quantize {variant} again")
    reference = require_file(converted / "student.gguf", "run the convert stage again")
    yardstick = require_file(converted / "teacher.gguf", "run the convert stage again")
    rows = chat.read_rows(source / "data" / "test.jsonl")
    metric = scoring.load(params.task.metric, source)
    taught = _teacher(distilled / "predictions.jsonl", rows)
    doing("load libraries and tokenizer")
    tokenizer = loading.load_tokenizer(distilled / "model")
    stops = loading.stop_ids(distilled / "model", tokenizer)

    doing("wait while another variant is measured")
    with busy(artifact.parent):
        doing("load the file")
        predictions = _predict(params, runtime.module, file, rows, taught, tokenizer, stops, metric)
        doing("load the files for perplexity")
        close = _likelihood(params, runtime.module, file, reference, source / "data" / "text.txt", rows, tokenizer)
    correct = [line["correct"] for line in predictions]
    accuracy, size = scoring.accuracy(correct), _size(file)
    metrics = {
        "accuracy": accuracy,
        "accuracy_retention": _ratio(accuracy, scoring.accuracy(taught)),
        "perplexity": close.perplexity,
        "perplexity_ratio": _ratio(close.perplexity, close.reference_perplexity),
        "mean_kld": close.mean_kld,
        "same_top_token": close.same_top_token,
        "size_bytes": float(size),
        "size_ratio": size / _size(yardstick),
    }
    prompt = chat.prompt_ids(tokenizer, sorted(rows, key=lambda row: len(str(row)))[len(rows) // 2][:-1])
    doing("wait for the other variants' work")
    with quiet(artifact.parent):
        doing("measure speed and memory")
        measured = measure(runtime, file, yardstick, prompt, params.validate_.repeats)

    details = {
        "per_group": scoring.per_group([line["reference"] for line in predictions], correct),
        "reference_perplexity": close.reference_perplexity,
        "scored_tokens": close.tokens,
        "context": close.context,
    }
    write_json(out / "metrics.json", metrics | details)
    write_json(out / "measurements.json", measured)
    jsonl.write(out / "predictions.jsonl", predictions)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _teacher(file: Path, rows: Sequence[chat.Messages]) -> list[bool]:
    """Whether the teacher was right, row by row of the test set."""
    require_file(file, "run the distill and select stages again")
    lines = jsonl.read(file)
    if [line["reference"] for line in lines] != [row[-1]["content"] for row in rows]:
        raise ArtifactError(f"{file} was made from other test rows: run the distill and select stages again")
    return [line["teacher_correct"] for line in lines]


def _predict(
    params: Params,
    runtime: RuntimeModule,
    file: Path,
    rows: Sequence[chat.Messages],
    taught: Sequence[bool],
    tokenizer: Any,
    stops: Sequence[int],
    metric: scoring.Metric,
) -> list[dict[str, Any]]:
    """Reference, greedy answer, whether they agree, and whether the teacher's does, for every test row. An answer that
    can no longer match is cut where that is certain.
    """
    references = [row[-1]["content"] for row in rows]
    drafts = [[*tokenizer(text, add_special_tokens=False)["input_ids"], stops[0]] for text in references]

    def hopeless(row: int, answer: Sequence[int]) -> bool:
        return scoring.hopeless(metric, tokenizer.decode(answer, skip_special_tokens=True), references[row])

    with progress("answer test rows", len(rows), "rows") as advance:
        ids = runtime.answers(
            file, [chat.prompt_ids(tokenizer, row[:-1]) for row in rows], drafts,
            stops=stops, limit=params.task.max_new_tokens, threads=threads(), advance=advance,
            hopeless=hopeless,
        )  # fmt: skip
    answers = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    correct = scoring.judged(metric, answers, references, "test.jsonl")
    return [
        {"reference": reference, "answer": answer, "correct": right, "teacher_correct": teacher}
        for reference, answer, right, teacher in zip(references, answers, correct, taught, strict=True)
    ]


def _likelihood(
    params: Params,
    runtime: RuntimeModule,
    file: Path,
    reference: Path,
    text: Path,
    rows: Sequence[chat.Messages],
    tokenizer: Any,
) -> likelihood.Likelihood:
    """Perplexity and KLD on the text that came with the data, else on the test conversations."""
    import torch

    torch.set_num_threads(threads())
    context = params.validate_.context
    with llama.window_logits(reference, context, threads()) as base:
        if text.is_file():
            tokens, start = base.session.tokenize(text.read_text(encoding="utf-8")), base.session.window_start()
        else:
            # The template writes its own BOS where it wants one.
            tokens, start = [token for row in rows for token in _whole(tokenizer, row)], None
        windows = likelihood.split(tokens, context, params.validate_.windows, start)
        with runtime.window_logits(file, context, threads()) as ours:
            return likelihood.compare(base, ours, windows)


def _whole(tokenizer: Any, row: chat.Messages) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(row, tokenize=True, return_dict=False)
    return ids


def _size(file: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return (
        sum(each.stat().st_size for each in file.rglob("*") if each.is_file()) if file.is_dir() else file.stat().st_size
    )


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan
