"""The typed form of params.yaml: one section per stage, checked once, all errors at once.

Each room has its section beside it; here they are put together. Everything is strict (no text is taken for a number)
and unknown keys are refused with the nearest right name. A choice between plug-ins is a union told apart by one field,
so a wrong name lists the right ones.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from tasks import param_errors
from tasks.acquire.params import Acquire
from tasks.distill.params import Distill
from tasks.errors import ConfigError
from tasks.finetune.params import Finetune
from tasks.measure.params import Measure
from tasks.models.params import OwnMetric, Task
from tasks.package.params import Package
from tasks.prune.params import Prune
from tasks.quantize.params import Quantize
from tasks.schema import Positive, Section
from tasks.select.params import Select
from tasks.teach.params import Teach
from tasks.validate.params import Validate

Model = TypeVar("Model", bound=BaseModel)


class Machine(Section):
    """How this machine is used. Not part of any stage's identity: it changes no result."""

    runner: Literal["threads", "dask"] = Field(
        "threads",
        description="Where stages run. `threads`: on this machine. `dask`: on the cluster that DASK_SCHEDULER_ADDRESS names, "
        "else in processes of this machine.",
    )
    parallel: Positive = Field(2, description="How many variants are worked on at once, on each machine.")
    retries: Annotated[int, Field(ge=0)] = Field(
        1,
        description="How often a stage is tried again after an error that may pass. A wrong parameter is not such an error.",
    )
    keep_runs: Positive = Field(
        5,
        description="How many worktrees of finished runs are kept, and as many of stopped ones. Older ones are removed, but none "
        "that works or waits for approval.",
    )


class Release(Section):
    """Who may release what passed. Not part of any stage's identity: it changes no result."""

    approval: Literal["manual", "auto"] = Field(
        "manual",
        description="Who releases. `manual`: a person. `auto`: the policy, where the version beats the champion by `margin`.",
    )
    margin: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Accuracy by which a version must beat the champion to be released without a person, as a share of the "
        "same test rows (0.01: one point). 0: it must not be worse.",
    )
    expires_hours: Annotated[float, Field(gt=0)] = Field(
        72.0, description="Hours after which a version that nobody approved or rejected is recorded as rejected."
    )
    separate_duties: bool = Field(
        False, description="Whether the person who started a run is kept from approving it. Names are taken as given."
    )


class Params(Section):
    """Every value of the pipeline, one section a stage."""

    acquire: Acquire
    task: Task = Task()
    finetune: Finetune
    teach: Teach = Teach()
    prune: Prune = Prune()
    distill: Distill
    select: Select = Select()
    quantize: Quantize
    validate_: Validate = Field(alias="validate")
    measure: Measure = Measure()
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
    return check(read(path, overrides), shown(str(path), overrides))


def shown(where: str, overrides: Sequence[str]) -> str:
    """How errors call a file of parameters that a command may have changed."""
    return f"{where} with what --set changes" if overrides else where


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The raw mapping in a file with overrides applied.

    Raises:
        ConfigError: it cannot be read, or an override is malformed.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: name a readable file") from None
    return parsed(source, str(path), overrides)


def parsed(source: bytes, where: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The raw mapping in YAML with overrides applied.

    Raises:
        ConfigError: it is no YAML, holds no sections, or an override is malformed.
    """
    try:
        raw = yaml.load(source.decode("utf-8"), _Loader)
    except _Twice as error:
        raise ConfigError(f"{where}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} holds no sections: see params.yaml in the repository for the form")
    for text in overrides:
        put(raw, text, yaml.safe_load)
    return raw


class _Twice(Exception):
    """A key stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader that takes no key twice: of two sections of a name it would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise _Twice(
                    f"{key.value} stands in line {lines[key.value]} and again in line {line}: change the first, and remove "
                    "the second"
                )
        return super().construct_mapping(node, deep)


def put(raw: Any, override: str, read_value: Callable[[str], Any]) -> None:
    """Write one `section.key=value` into nested mappings; `read_value` reads YAML.

    Raises:
        ConfigError: it is malformed.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as section.key=value")
    node = raw
    *parents, last = key.strip().split(".")
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: {key} runs through a value that has no keys")
    try:
        node[last] = read_value(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None


def expanded(overrides: Sequence[str]) -> list[str]:
    """Overrides as a person gives them: `@FILE` stands for all values of a file like params.yaml, which need not name
    every section. Never for what comes from a form: it must not name files.

    Raises:
        ConfigError: there is no such file, or its values are not in sections.
    """
    all_overrides: list[str] = []
    for text in overrides:
        if not text.startswith("@"):
            all_overrides.append(text)
            continue
        for section, values in read(Path(text[1:])).items():
            if not isinstance(values, dict):
                raise ConfigError(
                    f"--set {text}: {section} is no section with values: write it as `{section}: {{key: value}}`"
                )
            all_overrides += [override(f"{section}.{key}", value) for key, value in values.items()]
    return all_overrides


def override(key: str, value: Any) -> str:
    """`key=value` in YAML, where JSON's 7e-05 would be a text."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
    return f"{key}={text.strip().removesuffix('...').strip()}"


def check(raw: dict[str, Any], where: str) -> Params:
    """Validate a raw mapping.

    Raises:
        ConfigError: lists every problem with its key path.
    """
    return checked(Params, raw, where)


def checked(model: type[Model], raw: dict[str, Any], where: str) -> Model:
    """Validate a raw mapping as `model`; `where` names its file.

    Raises:
        ConfigError: lists every problem with its key path.
    """
    if keys := list(_with_nul(raw)):  # no path, name or prompt can hold it, and the system says so only when it is used
        raise ConfigError(f"{where}: {', '.join(keys)[:200]}: holds the character NUL: write it without")
    try:
        # JSON mode is strict about types yet takes lists for tuples and text for paths.
        return model.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        lines = param_errors.explained(error, model)
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
