"""openvino-int8 and openvino-int4: optimum-intel's export with NNCF's data-free weight compression, in OpenVINO's environment.

int8 has a scale and a zero point a row; int4 is symmetric, a scale for each group of weights, and embedding and output stay in
8 bits. The pinned recipe writes the same bytes twice.
"""

import json
import shutil
import tempfile
from pathlib import Path

from tasks.errors import StageError
from tasks.frame import crashes
from tasks.frame.events import doing
from tasks.frame.stage import need_space, require_file
from tasks.models.sizes import Shape
from tasks.quantize.inputs import Inputs
from tasks.quantize.options import OpenVino
from tasks.runtimes import openvino

BLOCK_BYTES = 80_000  # of the graph
LITTER = ("openvino_config.json",)  # it holds the path of what was exported
OWN = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
# GPT-2's words, as tokenizers' ByteLevel has them; and with digits one by one, before which white space stays in one piece.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_AND_WORDS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
# Model types that this optimum-intel exports with the transformers beside it. Not: Gemma, GLM, EXAONE and BitNet, for which it wants
# an older one, and LFM2, whose convolutions keep a state that cannot be cut back.
READ = frozenset({
    "arcee", "cohere", "cohere2", "falcon", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe", "hunyuan_v1_dense", "llama",
    "mistral", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm",
})  # fmt: skip


def quantize(variant: str, options: OpenVino, inputs: Inputs, out: Path) -> None:
    """Write `out`/model: OpenVINO's graph and weights, its tokenizer, and the chat template.

    Raises:
        ConfigError: OpenVINO is not installed.
        StageError: the disk is full, or the export fails.
    """
    require_file(inputs.student / "config.json", "run the distill and select stages again")
    weights = sum(file.stat().st_size for file in inputs.student.glob("*.safetensors"))
    need_space(out, 4 * weights)
    with tempfile.TemporaryDirectory(prefix=".openvino.", dir=out.parent) as name:
        scratch = Path(name).resolve()
        made = scratch / "model"
        doing("OpenVINO converts and compresses the graph")
        code, said = openvino.export(_readable(inputs.student, scratch), made, _compression(variant, options), scratch)
        if code != 0:
            raise _failure(variant, code, said, out)
        for litter in LITTER:
            (made / litter).unlink(missing_ok=True)
        for name in OWN:  # the student's own, byte for byte, in place of re-written ones
            if (inputs.student / name).is_file():
                shutil.copyfile(inputs.student / name, made / name)
        for name in ("openvino_model.xml", "openvino_tokenizer.xml"):
            require_file(made / name, "the export ended well yet did not write it")
        shutil.move(made, out / "model")


def _readable(student: Path, scratch: Path) -> Path:
    """The student with a tokenizer that OpenVINO reads as transformers does.

    Where a tokenizer parts digits first, and words in what lies between (SmolLM), OpenVINO looks for words in the whole text, so
    that white space before a digit is parted otherwise. One pattern says the same in one step.
    """
    path = student / "tokenizer.json"
    told = json.loads(path.read_bytes()) if path.is_file() else {}
    steps = (told.get("pre_tokenizer") or {}).get("pretokenizers", [])
    digits = [each.get("individual_digits") for each in steps if each["type"] == "Digits"]
    split = [each["pattern"].get("Regex") for each in steps if each["type"] == "Split"]
    if [each["type"] for each in steps] == ["Digits", "ByteLevel"] and digits == [True] and steps[1]["use_regex"]:
        last = steps[1]
    elif [each["type"] for each in steps] == ["Split", "Split", "ByteLevel"] and split == [r"\p{N}", WORDS]:
        last = steps[2]
    else:
        return student
    one = {"type": "Split", "pattern": {"Regex": DIGITS_AND_WORDS}, "behavior": "Isolated", "invert": False}
    told["pre_tokenizer"]["pretokenizers"] = [one, last | {"use_regex": False}]
    copy = scratch / "student"
    copy.mkdir()
    for file in student.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    return copy


def _compression(variant: str, options: OpenVino) -> list[str]:
    if variant == "openvino-int8":
        return ["--weight-format", "int8"]
    group = ["--group-size", str(options.group_size), "--group-size-fallback", "adjust"]
    return ["--weight-format", "int4", "--sym", "--ratio", "1.0", *group]


def _failure(variant: str, code: int, said: str, out: Path) -> Exception:
    if "No space left on device" in said or crashes.signal_of(code):
        return crashes.error_for(f"OpenVINO's export, which makes {variant},", code, said, out)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return StageError(
        f"OpenVINO cannot export {variant} ({lines[-1][-300:] if lines else 'it gives no reason'}): leave it out of "
        "quantize.variants, or choose an architecture that optimum-intel supports"
    )


def predicted_size(variant: str, options: OpenVino, shape: Shape) -> int:
    """Bytes of the folder: 8 bits with a float16 scale and a zero point a row; or 4 bits with a float16 scale a group, embedding
    and output as before. The tokenizer is there in two forms.
    """
    bytes_ = 0.0
    for tensor in shape.tensors:
        rows = tensor.elements / tensor.row
        whole = tensor.elements + 3 * rows
        if not tensor.matrix:
            bytes_ += 4 * tensor.elements
        elif variant == "openvino-int8" or tensor.name in ("token_embd.weight", "output.weight"):
            bytes_ += whole
        else:
            bytes_ += tensor.elements * (0.5 + 2 / options.group_size)
    blocks = 1 + max(tensor.block or 0 for tensor in shape.tensors)
    return int(bytes_ + 3.5 * shape.header) + BLOCK_BYTES * blocks


def obstacle(architecture: str) -> str | None:
    """Why no model of this `model_type` can be quantized so, or what is to be done first; None where nothing is in the way."""
    if architecture not in READ:
        return f"OpenVINO's exporter does not know {architecture} models"
    return None
