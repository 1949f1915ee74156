"""Stage acquire: an open model and a person's data, checked, as one plain folder with their lineage.

`acquire` reads top to bottom; each file beside it does one thing: `model_sources`, `data_sources` and `hub`
find and fetch, `gguf_check` and `safe_weights` refuse what could harm, `dequantise` reads GGUF, `containers` and
`forms` read the data, `rows`, `near_duplicates` and `fit` check it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.acquire import (
    data_sources,
    dequantise,
    ends,
    fit,
    gguf_check,
    model_sources,
    pointers,
    rows,
    safe_weights,
    watched,
)
from tasks.acquire.params import DATA_SOURCES, MODEL_SOURCES
from tasks.errors import ArtifactError, ConfigError, brief
from tasks.frame import events, manifest
from tasks.frame.stage import need_space
from tasks.models import dated, loading, logits, scoring, sizes, supports
from tasks.models.params import OwnMetric
from tasks.params import Params

__all__ = ["acquire"]

_ROOM = 1.5  # parameters of the model over those of the weights: an output layer may be the embedding once more


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
    watched.check(settings, root)
    data: data_sources.FoundData = DATA_SOURCES[settings.data.source].find(settings.data, root, scratch)
    model_sources.check_licence(data.licence, settings.licences, "the data", required=False)
    splits = _splits(params, data)

    if isinstance(params.task.metric, OwnMetric):
        _copy_metric(params.task.metric, splits["test"], root, out / scoring.OWN)

    events.doing("read the model")
    found: model_sources.Found = MODEL_SOURCES[settings.model.source].find(settings.model, root, scratch)
    licence_text = model_sources.read_licence(found.licence_text) if found.licence_text else None
    opened = _open_gguf(found, settings.licences) if found.path.is_file() else _open_folder(found, settings.licences)
    tokenizer, config = opened.tokenizer, opened.model.config
    if not loading.fits(tokenizer, config.vocab_size):
        raise ArtifactError(
            f"the tokenizer knows {len(tokenizer)} tokens, the model's vocabulary has {config.vocab_size}: they do not "
            "belong together, so take both from one place"
        )
    stops = ends.stops(opened.model, tokenizer)
    if dated.writes_day(tokenizer.chat_template):
        events.note(dated.NOTE)
    if config.model_type in supports.UNPRUNABLE:
        events.note(supports.cannot_prune(config.model_type))
    fit.check(tokenizer, config, splits, params.task)
    events.doing("check the weights")
    _check_numbers(opened.model)
    parameters = loading.count(opened.model)
    events.doing("save the model")
    _save(opened, stops, out / "model")

    rows.write(splits, out / "data")
    if data.text:
        _copy_text(data.text, out / "data" / "text.txt")
    if licence_text:
        (out / "LICENSE").write_text(licence_text, encoding="utf-8", newline="")
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
            "size_class": sizes.size_class(parameters),
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
    events.doing("read the rows")
    found = rows.load(data.files, data.shown, metric if isinstance(metric, str) else "own")
    if data_sources.ALL in found:
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
    found = {name: members[: settings.most.of(name)] for name, members in found.items()}
    events.doing("look for near duplicates")
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
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = found.path
    model_sources.check_licence(found.licence, allowed, str(folder), required=True)
    config = safe_weights.check_folder(folder)
    if config.get("model_type") in sizes.DENSE:  # before the weights are fetched; else by their headers
        _refuse_too_large(sizes.parameters(config), str(folder))
    found.finish()
    tensors, files = safe_weights.check_weights(folder)
    safe_weights.refuse_quantised(tensors, str(folder))
    parameters = safe_weights.parameters(tensors, config)
    _refuse_too_large(parameters, str(folder))
    tokenizer = loading.load_tokenizer(folder)
    with loading.foreign(f"{folder}: transformers cannot load this model"):
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(settings)
    _refuse_other_sizes(str(folder), empty, tensors, parameters)
    with loading.foreign(f"{folder}: transformers cannot load this model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    if hasattr(model.config, "auto_map"):  # it names code that is not here
        del model.config.auto_map
    _refuse_unfilled(str(folder), info)
    return _Opened(model.eval(), tokenizer, {path.name: manifest.sha256(path) for path in files}, found.licence)


def _refuse_other_sizes(where: str, empty: Any, tensors: safe_weights.Tensors, parameters: int) -> None:
    """Refuse weights of other sizes than the configuration's, before anything is allocated."""
    announced = loading.count(empty)
    if announced > _ROOM * parameters:
        raise ArtifactError(
            f"{where}: config.json announces a model of {announced} parameters, the weights have {parameters}: take both "
            "from one place"
        )
    own = {name: tuple(each.shape) for name, each in empty.state_dict().items()}
    wrong = [name for name, (_, shape) in tensors.items() if own.get(name, shape) != shape]
    if wrong and empty.config.model_type in sizes.DENSE:  # of others transformers may arrange weights anew
        raise ArtifactError(
            f"{where}: {wrong[0]} has the shape {list(tensors[wrong[0]][1])} where config.json asks for {list(own[wrong[0]])}: "
            "take config.json and weights from one commit"
        )


def _refuse_unfilled(where: str, info: Mapping[str, Any]) -> None:
    """Refuse weights that are not exactly those that the configuration asks for."""
    lost, extra = (
        sorted(str(key[0] if isinstance(key, tuple) else key) for name in names for key in info[name])
        for names in (("missing_keys", "mismatched_keys"), ("unexpected_keys",))
    )
    if lost:
        raise ArtifactError(
            f"{where}: its weights do not fill {_some(lost)}, which would be random: fetch the model again"
        )
    if extra:
        raise ArtifactError(
            f"{where}: its weights hold {_some(extra)}, for which the model of config.json has no place, so that they would "
            "be lost: take config.json and weights from one commit (num_hidden_layers, for one, must be that of the weights)"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return brief(", ".join(names[:5])) + more


def _refuse_too_large(parameters: int, where: str) -> None:
    if sizes.size_class(parameters) == "teacher-only":
        raise ArtifactError(
            f"{where} has {parameters / 1e9:.1f}B parameters: the student is cut from this model, and above "
            f"{sizes.MEDIUM / 1e9:.0f}B a model can only be a teacher: choose a smaller one"
        )


def _check_numbers(model: Any) -> None:
    """Refuse weights that are no numbers, and an architecture whose losses would be computed wrong."""
    import torch

    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise ArtifactError("the model's weights hold NaN or infinity: fetch the model again")
    logits.check(model)


def _save(opened: _Opened, stops: Sequence[int], out: Path) -> None:
    """Write the model with greedy decoding as its default and every id that ends a turn."""
    from transformers import GenerationConfig

    model, tokenizer = opened.model, opened.tokenizer
    if model.config.model_type.startswith("gemma") and not loading.sentence_pieces(tokenizer).is_file():
        raise ArtifactError(
            f"{loading.sentence_pieces(tokenizer)} is missing: llama.cpp's converter reads a Gemma model's vocabulary from this "
            "file: take the model, with it, from its own repository (acquire.model.source: local or hub)"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # A model's own sampling settings (temperature, top_p) would make evaluation and packaging non-greedy.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(stops), pad_token_id=pad, do_sample=False
    )
    need_space(out, 2 * loading.count(model))
    loading.save(model, tokenizer, out)


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
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"acquire.data.text: {source}: {error}: name a readable UTF-8 text file") from None
    if pointers.is_pointer(text[:64].encode()):
        raise ConfigError(f"acquire.data.text: {source} is {pointers.ADVICE}")
    if not text.strip():
        raise ConfigError(f"acquire.data.text: {source} is empty: name a file with text, or leave the parameter out")
    target.write_text(text, encoding="utf-8", newline="\n")
