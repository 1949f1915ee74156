"""The typed form of params.yaml: one section per stage, checked once, all errors at once.

Everything is strict (no text is taken for a number) and unknown keys are refused with the nearest right
name. A choice between plug-ins is a union told apart by one field, so a wrong name lists the right ones.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from tasks.errors import ConfigError

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="a full commit hash, never a branch or tag")]

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# --- acquire ---------------------------------------------------------------------------------------


class PackageModel(Section):
    """A GGUF model inside an installed Python distribution."""

    source: Literal["package"]
    distribution: str
    file: str = "*.gguf"
    licence: str | None = None


class GgufModel(Section):
    """A GGUF file, de-quantised."""

    source: Literal["gguf"]
    path: Path
    licence: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class LocalModel(Section):
    """A Hugging Face model folder on disk."""

    source: Literal["local"]
    path: Path
    licence: str | None = None


class HubModel(Section):
    """A model repository of the Hugging Face Hub at one commit. The token comes from HF_TOKEN."""

    source: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Commit
    licence: str | None = Field(None, description="instead of the one that the repository's card names")


class Splitting(Section):
    """How a single file of rows is split; where there is a file per split these are not used."""

    validation: Share = 0.1
    test: Share = 0.15
    seed: int = 17


class LocalData(Splitting):
    """Rows as JSONL, JSON, CSV or Parquet: one file (split here) or a folder with train/validation/test[/unlabelled]."""

    source: Literal["local"]
    path: Path
    unlabelled: Path | None = None
    text: Path | None = Field(None, description="plain text for perplexity and KLD; none: the test conversations")
    licence: str | None = None


class HubData(Splitting):
    """A data set repository of the Hub at one commit, holding the same files as a local folder."""

    source: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Commit
    licence: str | None = Field(None, description="instead of the one that the repository's card names")


class Most(Section):
    """Rows used of a split at most, the first ones; all where it says nothing."""

    train: Positive | None = None
    validation: Positive | None = None
    test: Positive | None = None
    unlabelled: Positive | None = None

    def of(self, split: str) -> int | None:
        limit: int | None = getattr(self, split)
        return limit


class Acquire(Section):
    watch: Path = Field(description="the folder or file that DVC watches: every local input lies in it")
    model: Annotated[PackageModel | GgufModel | LocalModel | HubModel, Field(discriminator="source")]
    data: Annotated[LocalData | HubData, Field(discriminator="source")]
    near_duplicate: Annotated[float, Field(ge=0.1, le=1)] = Field(
        0.95, description="character 5-gram Jaccard similarity at which two prompts count as one"
    )
    most: Most = Field(Most(), description="of each split")
    licences: tuple[str, ...] = Field(
        (), description="licences that may be used, as SPDX ids; empty: any, but recorded"
    )

    @property
    def local(self) -> list[Path]:
        """Every file and folder of this machine that is read, relative to the workspace."""
        names = ("path", "unlabelled", "text")
        return [path for part in (self.model, self.data) for name in names if (path := getattr(part, name, None))]

    @model_validator(mode="after")
    def _watched(self) -> "Acquire":
        for path in self.local:
            self.check_watched(path)
        return self

    def check_watched(self, path: Path, key: str = "") -> None:
        """Raises ValueError for a local input that lies outside `watch`."""
        if not path.is_relative_to(self.watch) or ".." in path.parts:
            raise ValueError(
                f"{key}{path} lies outside watch ({self.watch}): DVC would not see it change: move it there, or set watch to "
                "a folder that holds all local inputs"
            )


# --- the task, shared by training and evaluation ----------------------------------------------------


class OwnMetric(Section):
    """A function `match(answer: str, reference: str) -> bool` in a Python file below acquire.watch."""

    file: Path
    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = "match"


Metric = Literal["json", "text"]


class Task(Section):
    metric: Annotated[
        Annotated[Metric, Tag("name")] | Annotated[OwnMetric, Tag("own")],
        Discriminator(lambda given: "own" if isinstance(given, dict | OwnMetric) else "name"),
    ] = Field("json", description="how an answer is compared with its reference; or {file, function} of one's own")
    max_length: Annotated[int, Field(ge=16)] = Field(
        256, description="tokens of a training row; longer rows are refused"
    )
    max_new_tokens: Positive = 64


# --- training ----------------------------------------------------------------------------------------


class Training(Section):
    """Hyper-parameters that fine-tuning and distillation share."""

    epochs: Annotated[float, Field(gt=0, description="passes over the rows, cut where `most_rows` are read")]
    most_rows: Positive | None = Field(None, description="rows read over all epochs, at most; none: no limit")
    learning_rate: Rate
    batch_tokens: Annotated[int, Field(ge=16)] = Field(1024, description="unpadded tokens of an optimiser step")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of the steps")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="gradient norm")
    freeze_embeddings: bool = Field(True, description="leave the (tied) embedding as it is: faster, forgets less")
    evaluations: Positive = Field(4, description="validation passes over the run; the best one is kept")
    patience: Positive = Field(2, description="validation passes without improvement before stopping")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: the faster one of this machine")

    def passes(self, rows: int) -> float:
        """Epochs over so many rows, with `most_rows` kept to."""
        return min(self.epochs, self.most_rows / rows) if self.most_rows else self.epochs


class Finetune(Training):
    enabled: bool = True
    seed: int = 17


class Distill(Training):
    max_parameters: Share = Field(0.85, description="largest student, as a share of the teacher's parameters")
    block_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="of the parameters that go, how many go as whole blocks; the others as channels of the MLPs"
    )
    candidates: Positive = Field(8, description="blocks of least influence tried at each removal")
    calibration_rows: Positive = Field(64, description="validation rows that decide which blocks are removed")
    fitted_rows: Annotated[int, Field(ge=0)] = Field(
        1000, description="rows on which the loss of each block is made good before training; 0: it is not"
    )
    temperature: Annotated[float, Field(gt=0)] = 1.0
    soft_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.7, description="share of the KD term; the rest is cross-entropy"
    )
    hidden_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of matching the teacher's last hidden states, beside KD and cross-entropy"
    )
    top_k: Positive = Field(32, description="teacher targets kept per token; the rest is one tail mass")
    unlabelled_rows: Annotated[int, Field(ge=0)] = Field(0, description="unlabelled prompts that the teacher answers")
    control: bool = Field(False, description="also train the pruned student without the teacher's targets")


class Select(Section):
    """Chance has a share in what a student becomes: of several, the one that goes on."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        (17,), description="one student each; that of the least validation loss goes on"
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Select":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("a seed is named twice")
        return self


# --- quantize, validate, package ---------------------------------------------------------------------

Variant = Literal["f16", "q8_0", "q5_1", "q5_0", "q4_k_m", "q4_0", "onnx-int4"]


class Onnx(Section):
    block_size: Literal[16, 32, 64, 128] = 32
    accuracy_level: Literal[1, 2, 3, 4] = 4


class Quantize(Section):
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    onnx: Onnx = Onnx()

    @model_validator(mode="after")
    def _distinct(self) -> "Quantize":
        if len(set(self.variants)) != len(self.variants):
            raise ValueError("a variant is named twice")
        return self


class Gate(Section):
    """One rule on one number of a variant: give exactly one of the two limits."""

    name: Literal[
        "accuracy", "accuracy_retention", "perplexity", "perplexity_ratio", "mean_kld", "same_top_token",
        "size_bytes", "size_ratio", "load_s", "ttft_p95_s", "prefill_tokens_per_s", "decode_tokens_per_s",
        "decode_speedup", "peak_rss_bytes", "peak_rss_ratio",
    ]  # fmt: skip
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "Gate":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give exactly one of at_least and at_most")
        return self


class Validate(Section):
    context: Annotated[int, Field(ge=8)] = Field(512, description="tokens of a perplexity window")
    windows: Positive = Field(12, description="windows scored at most")
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    max_half_width: Share = Field(0.03, description="a wider 95 % interval around a limit means: too few samples")
    repeats: Annotated[int, Field(ge=3)] = Field(20, description="latency samples after warm-up")
    gates: tuple[Gate, ...]
    seed: int = 17


class Package(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    choose: Literal["smallest", "fastest", "most_accurate"] = "smallest"
    targets: Annotated[tuple[Literal["ollama", "llama-server", "onnx-genai"], ...], Field(min_length=1)]
    context_length: Annotated[int, Field(ge=128)] = 2048


class Machine(Section):
    """How this machine is used. Not part of any stage's identity: it changes no result."""

    runner: Literal["threads", "dask"] = Field(
        "threads", description="dask: on the cluster of DASK_SCHEDULER_ADDRESS, or on processes of this machine"
    )
    parallel: Positive = Field(2, description="variants worked on at once, on each machine")
    retries: Annotated[int, Field(ge=0)] = 1
    keep_runs: Positive = Field(
        5, description="worktrees of finished runs that are kept, and of stopped ones; older ones are removed"
    )


class Release(Section):
    """Who may release what passed. Not part of any stage's identity: it changes no result."""

    approval: Literal["manual", "auto"] = Field("manual", description="auto: the policy may release, without a person")
    margin: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="accuracy by which the policy wants the champion beaten, on the same test rows; 0: not worse"
    )
    expires_hours: Annotated[float, Field(gt=0)] = Field(72.0, description="until a question for approval lapses")
    separate_duties: bool = Field(False, description="who started a run may not approve it; names are taken as given")


class Params(Section):
    acquire: Acquire
    task: Task = Task()
    finetune: Finetune
    distill: Distill
    select: Select = Select()
    quantize: Quantize
    validate_: Validate = Field(alias="validate")
    package: Package
    machine: Machine = Machine()
    release: Release = Release()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Params":
        if self.task.max_length > self.package.context_length:
            raise ValueError(
                f"task.max_length is {self.task.max_length} and package.context_length {self.package.context_length}: a "
                "bundle could not take the longest rows that it was trained on: raise the second or lower the first"
            )
        metric = self.task.metric
        if isinstance(metric, OwnMetric):
            self.acquire.check_watched(metric.file, "task.metric.file: ")
        return self

    def digest(self, sections: Iterable[str]) -> str:
        """sha256 over the named sections (`section` or `section.key`): what an output depends on besides its inputs."""
        values = self.model_dump(mode="json", by_alias=True)
        chosen = {name: reduce(lambda node, key: node[key], name.split("."), values) for name in sections}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def only(self, sections: Iterable[str]) -> "Params":
        """The same parameters with every other section, and every other key of a section named by keys, absent: reading
        one is an AttributeError.
        """
        view = _empty(Params)
        for section in sections:
            name, key = field_name(section), section.partition(".")[2]
            whole = getattr(self, name)
            if key:
                part = view.__dict__.setdefault(name, _empty(type(whole)))
                part.__dict__[key] = getattr(whole, key)
            else:
                view.__dict__[name] = whole
        return view


def _empty(kind: type[Model]) -> Model:
    """A model without any value, not even those that have a default."""
    made = kind.model_construct()
    made.__dict__.clear()
    return made


def field_name(section: str) -> str:
    """The attribute of a section; `validate` would hide a pydantic method."""
    top = section.partition(".")[0]
    return "validate_" if top == "validate" else top


def load(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Read params.yaml, apply `key.path=value` overrides (values are YAML) and check everything.

    Raises:
        ConfigError: lists every problem with its key path.
    """
    return check(read(path, overrides), str(path))


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The raw mapping with overrides applied."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: name a readable file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no sections: see params.yaml in the repository for the form")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override}: write it as section.key=value")
        node: Any = raw
        *parents, last = key.strip().split(".")
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {key} runs through a value that has no keys")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None
    return raw


def expanded(overrides: Sequence[str]) -> list[str]:
    """Overrides as a person gives them: `@FILE` stands for all values of a file like params.yaml, which need not name
    every section. Never for what comes from a form: it must not name files.

    Raises:
        ConfigError: there is no such file, or its values are not in sections.
    """
    found: list[str] = []
    for text in overrides:
        if not text.startswith("@"):
            found.append(text)
            continue
        for section, values in read(Path(text[1:])).items():
            if not isinstance(values, dict):
                raise ConfigError(
                    f"--set {text}: {section} is no section with values: write it as `{section}: {{key: value}}`"
                )
            found += [override(f"{section}.{key}", value) for key, value in values.items()]
    return found


def override(key: str, value: Any) -> str:
    """`key=value` in YAML, where JSON's 7e-05 would be a text."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
    return f"{key}={text.strip().removesuffix('...').strip()}"


def check(raw: dict[str, Any], where: str) -> Params:
    """Validate a raw mapping.

    Raises:
        ConfigError: lists every problem with its key path.
    """
    if keys := list(_with_nul(raw)):  # no path, name or prompt can hold it, and the system says so only when it is used
        raise ConfigError(f"{where}: {', '.join(keys)[:200]}: holds the character NUL: write it without")
    try:
        # JSON mode is strict about types yet takes lists for tuples and text for paths.
        return Params.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        found = error.errors()
        # What is said of a list's length counts the items that are right: it only hides what is said of the others.
        told = [p for p in found if p["type"] != "too_short" or not any(_within(each, p) for each in found)]
        lines = [_explain(problem, raw) for problem in told]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError(f"{where} has {count}:\n  " + "\n  ".join(lines)) from None


def _with_nul(node: Any, key: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _with_nul(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _with_nul(value, f"{key}.{number}")
    elif isinstance(node, str) and "\0" in node:
        yield key


def _within(problem: Any, outer: Any) -> bool:
    """Whether a problem lies in what another one is about."""
    place, around = problem["loc"], outer["loc"]
    return len(place) > len(around) and place[: len(around)] == around


def _none_of(key: str, given: Any, right: Sequence[str]) -> str:
    """What to say of a value that must be one of a few."""
    near = difflib.get_close_matches(str(given).lower(), right, n=1)
    return f"{key}: {given!r} is none of {', '.join(right)}" + (f": did you mean {near[0]!r}?" if near else "")


def _explain(problem: Any, raw: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    given, message = problem.get("input"), problem["msg"].removeprefix("Value error, ")
    if not location:  # a rule between sections, which names its key itself
        return str(message)
    # Pydantic puts the tag of a union into the location; the person never wrote it.
    known = [part for i, part in enumerate(location) if not (i >= 2 and part in _TAGS.get(location[i - 1], ()))]
    key = ".".join(known)
    if problem["type"] == "extra_forbidden":
        if key == "distill.seed":
            return f"{key}: unknown key: select.seeds has taken its place, a list"
        near = difflib.get_close_matches(location[-1], [name for name in _KEYS if name != location[-1]], n=1)
        return f"{key}: unknown key" + (f": did you mean {near[0]!r}?" if near else ": remove it")
    newest = "`git ls-remote https://huggingface.co/OWNER/NAME HEAD` tells the newest"
    if (location[-1] == "revision" and not given) or problem["type"] == "missing":
        hint = f": the 40-digit hash of a commit, {newest}"
        return f"{key}: missing" + (hint if location[-1] == "revision" else "")
    if isinstance(given, str) and problem["type"].startswith(("float", "int")):
        hint = f": write {float(given):.1e} with a dot" if _is_number(given) and "e" in given.lower() else ""
        return f"{key}: {given!r} is text, not a number{hint} (YAML reads 1e-4 as text, 1.0e-4 as a number)"
    if location[-1] == "revision":
        return f"{key}: {given!r} is not a 40-digit commit hash: a branch or tag can move, so pin the commit it points to now ({newest})"
    if problem["type"] in ("literal_error", "union_tag_invalid"):
        told = problem["ctx"]
        tagged = problem["type"] == "union_tag_invalid"
        key = f"{key}.{told['discriminator'].strip(chr(39))}" if tagged else key
        listed = told["expected_tags"] if tagged else told["expected"].replace(" or ", ", ")
        return _none_of(key, told["tag"] if tagged else given, [each.strip("'") for each in listed.split(", ")])
    if problem["type"] == "union_tag_not_found":
        return f"{key}: missing {problem['ctx']['discriminator']}: one of {', '.join(_TAGS[location[-1]])}"
    if problem["type"] == "tuple_type" and isinstance(given, str | int | float):
        return f"{key}: {given!r} is no list: write [{given}]"
    if problem["type"] == "json_invalid":
        return f"not representable: {message}"
    return f"{key}: {message}" + ("" if isinstance(given, (dict, list)) else f" (given {given!r})")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _all_keys(model: Any) -> set[str]:
    keys: set[str] = set()
    for name, info in model.model_fields.items():
        keys.add(info.alias or name)
    return keys


_TAGS = {"model": ("package", "gguf", "local", "hub"), "data": ("local", "hub"), "metric": ("name", "own")}
_MODELS = (
    Params,
    Acquire,
    PackageModel,
    GgufModel,
    LocalModel,
    HubModel,
    LocalData,
    HubData,
    OwnMetric,
    Task,
    Finetune,
    Distill,
)
_KEYS = sorted(
    set().union(*map(_all_keys, (*_MODELS, Select, Quantize, Onnx, Gate, Validate, Package, Machine, Release)))
)
