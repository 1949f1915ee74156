"""Stage acquire: an open model and a person's data, checked, as one plain folder with their lineage.

`acquire` reads top to bottom; each file beside it does one thing: `model_sources`, `data_sources` and `hub`
find and fetch, `gguf_check` and `safe_weights` refuse what could harm, `dequantise` reads GGUF, `rows` and
`near_duplicates` check the data.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import chat, events, manifest, models, scoring
from tasks.acquire import data_sources, dequantise, gguf_check, model_sources, rows, safe_weights
from tasks.errors import ArtifactError, ConfigError
from tasks.params import LocalData, OwnMetric, Params
from tasks.stage import need_space

__all__ = ["acquire"]


@dataclass(frozen=True)
class _Opened:
    """A model in memory and what the lineage says of its weights."""

    model: Any
    tokenizer: Any
    sha256: Mapping[str, str]
    licence: str | None


def acquire(params: Params, *, root: Path, out: Path, scratch: Path) -> dict[str, float]:
    """Fill `out` with `model/`, `data/`, `lineage.json`, the model's `LICENSE` and the file of a metric of one's own.

    Paths in `params` are relative to `root`; downloads lie in `scratch` until the stage has succeeded.
    Returns the number of parameters and the rows of each split.

    Raises:
        ConfigError: a source, a licence or the data is not usable.
        ArtifactError: the model is unsafe, damaged, too large for a student or not supported.
        StageError: the network or the disk failed.
    """
    settings = params.acquire
    data = data_sources.SOURCES[settings.data.source](settings.data, root, scratch)
    model_sources.check_licence(data.licence, settings.licences, "the data", required=False)
    splits = _splits(params, data)

    if isinstance(params.task.metric, OwnMetric):
        _copy_metric(params.task.metric, splits["test"], root, out / scoring.OWN)

    found = model_sources.SOURCES[settings.model.source](settings.model, root, scratch)
    opened = _open_gguf(found, settings.licences) if found.path.is_file() else _open_folder(found, settings.licences)
    _check_rows(opened, splits, params.task.max_length)
    parameters = models.count(opened.model)
    _save(opened, out / "model")

    rows.write(splits, out / "data")
    if data.text:
        _copy_text(data.text, out / "data" / "text.txt")
    if found.licence_text:
        shutil.copyfile(found.licence_text, out / "LICENSE")
    counts = {name: len(members) for name, members in splits.items() if members}
    sources = {data.shown[role]: manifest.sha256(path) for role, path in data.files.items()}
    lineage = {
        "model": {
            "source": settings.model.source,
            **found.identity,
            "sha256": dict(opened.sha256),
            "licence": opened.licence,
            "architecture": opened.model.config.model_type,
            "parameters": parameters,
            "size_class": models.size_class(parameters),
        },
        "data": {
            "source": settings.data.source,
            **data.identity,
            "licence": data.licence,
            "sha256": sources,
            "rows": counts,
        },
    }
    text = json.dumps(lineage, indent=2, sort_keys=True, ensure_ascii=False)
    (out / "lineage.json").write_text(text + "\n", encoding="utf-8")
    return {"parameters": parameters, **{f"rows_{name}": count for name, count in counts.items()}}


def _splits(params: Params, data: data_sources.FoundData) -> dict[str, list[rows.Row]]:
    settings = params.acquire
    near = settings.near_duplicate
    metric = params.task.metric
    found = rows.load(data.files, data.shown, metric if isinstance(metric, str) else "own")
    if isinstance(settings.data, LocalData) and data_sources.ALL in found:
        unlabelled, shares = found.get(rows.UNLABELLED, []), settings.data
        found = rows.split(
            found[data_sources.ALL],
            unlabelled,
            validation=shares.validation,
            test=shares.test,
            near=near,
            seed=shares.seed,
        )
        found[rows.UNLABELLED] = unlabelled
    rows.refuse_leaks(found, near)
    return found


def _open_gguf(found: model_sources.Found, allowed: tuple[str, ...]) -> _Opened:
    info = gguf_check.check(found.path)
    stated = info.metadata.get("general.license")
    licence = found.licence or (stated if isinstance(stated, str) else None) or found.package_licence
    model_sources.check_licence(licence, allowed, str(found.path), required=True)
    _refuse_too_large(info.parameters, str(found.path))
    model, tokenizer = dequantise.dequantise(found.path, info)
    return _Opened(model, tokenizer, {found.path.name: manifest.sha256(found.path)}, licence)


def _open_folder(found: model_sources.Found, allowed: tuple[str, ...]) -> _Opened:
    import torch
    from transformers import AutoModelForCausalLM

    folder = found.path
    model_sources.check_licence(found.licence, allowed, str(folder), required=True)
    config = safe_weights.check_folder(folder)
    if config.get("model_type") in models.DENSE:  # before the weights are fetched; else by their headers
        _refuse_too_large(models.parameters_from_config(config), str(folder))
    found.finish()
    tensors, files = safe_weights.check_weights(folder)
    _refuse_too_large(safe_weights.parameters(tensors, config), str(folder))
    tokenizer = models.load_tokenizer(folder)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{folder}: transformers cannot load this model: {error}") from error
    if hasattr(model.config, "auto_map"):  # it names code that is not here
        del model.config.auto_map
    lost = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if lost:
        raise ArtifactError(
            f"{folder}: its weights do not fill {', '.join(lost[:5])}, which would be random: fetch the model again"
        )
    return _Opened(model.eval(), tokenizer, {path.name: manifest.sha256(path) for path in files}, found.licence)


def _refuse_too_large(parameters: int, where: str) -> None:
    if models.size_class(parameters) == "teacher-only":
        raise ArtifactError(
            f"{where} has {parameters / 1e9:.1f}B parameters: the student is cut from this model, and above "
            f"{models.MEDIUM / 1e9:.0f}B a model can only be a teacher: choose a smaller one"
        )


def _check_rows(opened: _Opened, splits: Mapping[str, Sequence[rows.Row]], limit: int) -> None:
    """Refuse rows that training would have to cut or cannot embed, while they can still be named by file and line."""
    from jinja2 import TemplateError

    tokenizer, known = opened.tokenizer, opened.model.config.vocab_size
    if not models.fits(tokenizer, known):
        raise ArtifactError(
            f"the tokenizer knows {len(tokenizer)} tokens, the model's vocabulary has {known}: they do not "
            "belong together, so take both from one place"
        )
    problems = []
    total = sum(map(len, splits.values()))
    with events.progress("check row lengths", total, "rows") as advance:
        for name, members in splits.items():
            for row in members:
                try:
                    if name == rows.UNLABELLED:
                        ids = chat.prompt_ids(tokenizer, row.messages)
                    else:
                        # The limit is ours to report: all rows at once, each with its place.
                        ids = chat.encode(tokenizer, row.messages, 2**62).ids
                    if len(ids) > limit:
                        problems.append(f"{row.where}: {len(ids)} tokens")
                    if max(ids) >= known:
                        problems.append(f"{row.where}: the model has nothing for {tokenizer.decode([max(ids)])!r}")
                except TemplateError as error:
                    problems.append(f"{row.where}: the model's chat template refuses it: {error}")
                advance()
    rows.report(problems, "the data", f"task.max_length is {limit} tokens: raise it, or shorten these rows")


def _save(opened: _Opened, out: Path) -> None:
    """Write the model with greedy decoding as its default and every id that ends a turn."""
    import torch
    from transformers import GenerationConfig

    model, tokenizer = opened.model, opened.tokenizer
    if model.config.model_type.startswith("gemma") and not models.sentence_pieces(tokenizer).is_file():
        raise ArtifactError(
            f"{models.sentence_pieces(tokenizer)} is missing: llama.cpp's converter reads a Gemma model's vocabulary from this "
            "file: take the model, with it, from its own repository (acquire.model.source: local or hub)"
        )
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise ArtifactError("the model's weights hold NaN or infinity: fetch the model again")
    told = model.generation_config.eos_token_id
    listed = told if isinstance(told, list) else [told]
    stops = {*listed, tokenizer.eos_token_id, chat.end_of_turn(tokenizer)} - {None}
    if not stops:
        raise ArtifactError("neither tokenizer nor generation config names an end-of-turn token: choose another model")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # A model's own sampling settings (temperature, top_p) would make evaluation and packaging non-greedy.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(stops), pad_token_id=pad, do_sample=False
    )
    need_space(out, 2 * models.count(model))
    models.save(model, tokenizer, out)


def _copy_metric(metric: OwnMetric, test: Sequence[rows.Row], root: Path, target: Path) -> None:
    """Take the metric's file over, once it is seen to hold each reference of the test split for right."""
    source = root / metric.file
    if not source.is_file():
        raise ConfigError(f"task.metric.file: {source} is no file: name a Python file below acquire.watch")
    target.write_bytes(source.read_bytes())
    references = [row.messages[-1]["content"] for row in test]
    right = scoring.judged(scoring.load(metric, target.parent), references, references, "the test rows")
    if not all(right):
        raise ConfigError(
            f"task.metric: {metric.function} of {metric.file} holds a reference for wrong where the answer is that very text, "
            f"as in {test[right.index(False)].where}: correct it"
        )


def _copy_text(source: Path, target: Path) -> None:
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"acquire.data.text: {source}: {error}: name a readable UTF-8 text file") from None
    if not text.strip():
        raise ConfigError(f"acquire.data.text: {source} is empty: name a file with text, or leave the parameter out")
    target.write_text(text, encoding="utf-8", newline="\n")
