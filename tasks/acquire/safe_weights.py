"""What a model folder may hold: safetensors whose header is sound, and nothing that could run code.

Names are not trusted: the first bytes of every file say whether it is a pickle. The safetensors header is
checked as https://github.com/huggingface/safetensors (README, "Format") states it.
"""

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from tasks.acquire import config_check, pointers
from tasks.errors import ArtifactError, brief
from tasks.frame import events
from tasks.models import loading, sizes

MAX_HEADER = 16 * 2**20  # bytes; some 120,000 tensors. The library's own limit is 100 MB
MAX_DIMENSIONS = 8
MAX_JSON = 64 * 2**20  # bytes of a configuration or an index
# bits of an element, by dtype
DTYPES: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_PLAIN = frozenset({"F16", "BF16", "F32", "F64"})
INDEX = "model.safetensors.index.json"
_CODE = frozenset({".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"})
_OTHER_WEIGHTS = frozenset({
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".h5", ".keras", ".msgpack",
})  # fmt: skip
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


def check_names(where: str, names: list[str]) -> None:
    """Refuse code by its name.

    Raises:
        ArtifactError: a file is Python or native code.
    """
    code = sorted(name for name in names if Path(name).suffix.lower() in _CODE)
    if code:
        raise ArtifactError(
            f"{where} carries code ({brief(', '.join(code[:5]))}): such a model needs trust_remote_code, which is never given: "
            "choose a model that transformers supports by itself, or leave the code out where it does"
        )


def check_folder(folder: Path) -> dict[str, Any]:
    """Hold everything but the weights' headers of a Hugging Face model folder against the rules; returns its config.

    Raises:
        ArtifactError: code, a pickle under any name, weights in another format, `auto_map`, an adapter,
            or weights that are already quantised.
    """
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder: name a Hugging Face model folder, or use source: gguf for a file"
        )
    files = sorted(path for path in folder.rglob("*") if ".git" not in path.relative_to(folder).parts)
    odd = [path for path in files if not (path.is_file() or path.is_dir())]
    if odd:
        raise ArtifactError(f"{odd[0]} is no regular file (a broken link, a pipe or a device): remove it")
    files = [path for path in files if path.is_file()]
    check_names(str(folder), [path.relative_to(folder).as_posix() for path in files])
    unread = _left_aside(folder, files)
    for path in files:
        pointers.refuse(path)
        if path in unread:
            continue
        _refuse_pickle(path)
        if path.suffix.lower() in _OTHER_WEIGHTS:
            raise ArtifactError(
                f"{path}: only safetensors and GGUF weights are read, other formats can run code when they are loaded: "
                "save the weights with save_pretrained (safetensors)"
            )
        if path.suffix == ".json" and "config" in path.name and _wants_code(path):
            raise ArtifactError(
                f"{path} has an auto_map: such a model runs code from its repository, which is never allowed: "
                "choose a model that transformers supports by itself"
            )
    if (folder / "adapter_config.json").exists():
        raise ArtifactError(f"{folder} is an adapter, not a model: merge it into its base model first")
    config = check_architecture(folder)
    if "quantization_config" in config:
        raise ArtifactError(f"{folder} is quantised already: take the original model, its weights are needed in full")
    return config


def _left_aside(folder: Path, files: list[Path]) -> set[Path]:
    """Files that nobody loads: a trainer's state, or the weights once more in a format that is not read."""
    if not any((folder / name).is_file() for name in ("model.safetensors", INDEX)):
        return set()
    unread = {path for path in files if path.suffix.lower() in _OTHER_WEIGHTS}
    if unread:
        names = ", ".join(sorted(path.relative_to(folder).as_posix() for path in unread))
        events.note(f"left aside in {folder}, neither loaded nor copied: {brief(names)}")
    return unread


def check_architecture(folder: Path) -> dict[str, Any]:
    """Refuse what could be trained but not served; returns the model's config.

    Raises:
        ArtifactError: config.json is missing or damaged, or names such an architecture.
    """
    config = loading.load_config(folder)
    config_check.check(config, str(folder / "config.json"))
    if config.get("model_type") == "bitnet":
        raise ArtifactError(
            f"{folder} is a BitNet model, which this pipeline cannot carry: training here would not keep its weights ternary, "
            "and llama.cpp computes it with SiLU where it needs a squared ReLU: run it as it is with bitnet.cpp, or choose "
            "another small model, such as one of recipes/"
        )
    return config


def _wants_code(path: Path) -> bool:
    """An `auto_map`; one in config.json is passed over where transformers has the architecture itself (Phi's has one)."""
    config = _json_object(path)
    return "auto_map" in config and not (path.name == "config.json" and config.get("model_type") in sizes.DENSE)


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(3)
    # Protocol 2 and later begin with an opcode and the version; a safetensors header of 640 to 1,408 bytes
    # can begin alike, but goes on with a zero, which is no opcode. torch.save writes a zip, before 1.6 a pickle.
    pickled = len(head) == 3 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[2] != 0
    if pickled or head[:2] == b"PK":
        kind = "a pickle" if pickled else "a zip archive, as torch.save writes its pickles"
        raise ArtifactError(
            f"{path} is {kind}, whatever its name: a pickle can run any code when it is loaded, so it is refused: "
            "take the model's safetensors"
        )


def _json_object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes, far more than a configuration needs")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path} is not JSON: take the model from its source again") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object: take the model from its source again")
    return value


def weight_names(folder: Path) -> list[str]:
    """The safetensors files that transformers would load from `folder`, whether they are there yet or not.

    Raises:
        ArtifactError: the index is damaged or points out of the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    shards = _json_object(index).get("weight_map")
    names: set[Any] = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    if not names or not all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) for name in names):
        raise ArtifactError(f"{index}: weight_map does not map tensors to safetensors files beside it")
    return sorted(names)


def check_weights(folder: Path) -> tuple[Tensors, list[Path]]:
    """Check the header of every weights file; returns all tensors and the files.

    Raises:
        ArtifactError: a file is missing or unsound, a tensor comes twice or is not where the index says.
    """
    paths = [folder / name for name in weight_names(folder)]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    origin: dict[str, str] = {}
    for path in paths:
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: a model folder holds its weights as safetensors")
        for name, value in check_safetensors(path).items():
            if name in tensors:
                raise ArtifactError(
                    f"{path} holds the tensor {brief(repr(name))}, which {origin[name]} holds too: save the model again"
                )
            tensors[name], origin[name] = value, path.name
    index = folder / INDEX
    if index.is_file() and (listed := _json_object(index)["weight_map"]) != origin:
        wrong = sorted(name for name in {*listed, *origin} if listed.get(name) != origin.get(name))
        raise ArtifactError(
            f"{index} does not agree with the files about {brief(', '.join(wrong[:5]))}: fetch the model again"
        )
    return tensors, paths


def refuse_quantised(tensors: Tensors, where: str) -> None:
    """Refuse weights whose numbers mean something only together with scales kept elsewhere.

    Raises:
        ArtifactError: names some.
    """
    quantised = sorted(
        f"{name} ({dtype})" for name, (dtype, _) in tensors.items() if name.endswith("weight") and dtype not in _PLAIN
    )
    if quantised:
        raise ArtifactError(
            f"{where}: its weights are quantised already or no real numbers ({brief(', '.join(quantised[:5]))}): take the "
            "original model, its weights are needed in full"
        )


def parameters(tensors: Tensors, config: Mapping[str, Any]) -> int:
    """Parameters by the weights' headers; an output layer that is tied to the embedding counts once."""
    tied = bool(config.get("tie_word_embeddings")) and "lm_head.weight" in tensors and len(tensors) > 1
    return sum(prod(shape) for name, (_, shape) in tensors.items() if not (tied and name == "lm_head.weight"))


def check_safetensors(path: Path) -> Tensors:
    """Check one file's header against the file.

    Raises:
        ArtifactError: the header is too long, not JSON, has an unknown dtype, or offsets that leave gaps,
            overlap, or do not end with the file.
    """
    _refuse_pickle(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            _refuse(path, f"its header is said to have {length} bytes, the file has {size}")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        _refuse(path, "its header does not begin with '{'")
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not JSON ({brief(error)})")
    header.pop("__metadata__", None)
    if not header:
        _refuse(path, "it holds no tensors")
    spans = []
    tensors = {}
    for name, entry in header.items():
        dtype, shape, span = _entry(path, name, entry)
        tensors[name] = (dtype, shape)
        spans.append((*span, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            _refuse(
                path, f"{brief(name)} begins at byte {first} of the data, not at {end} where the tensor before it ends"
            )
        end = last
    if end != size - 8 - length:
        _refuse(path, f"its tensors end at byte {end} of {size - 8 - length} bytes of data")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"{brief(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(path, f"{brief(name)} has the unknown dtype {brief(repr(dtype))}")
    for numbers in (shape, span):
        if (
            not isinstance(numbers, list)
            or len(numbers) > MAX_DIMENSIONS
            or not all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        ):
            _refuse(path, f"{brief(name)} has a shape or offsets that are not a few whole numbers")
    if len(span) != 2 or (span[1] - span[0]) * 8 != prod(shape) * DTYPES[dtype]:
        _refuse(path, f"{brief(name)} has offsets {span} that do not fit its shape {shape} of {dtype}")
    return dtype, tuple(shape), (span[0], span[1])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name comes twice")
    return unique


def _refuse(path: Path, problem: str) -> NoReturn:
    raise ArtifactError(f"{path} is not a sound safetensors file: {problem}: fetch it again, or save the model again")
