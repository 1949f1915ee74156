"""Convert: Hugging Face folder -> F16 GGUF, once for the teacher (the yardstick) and once for the student.

The work is done by llama.cpp's own converter, which set-up unpacks from the source package that the
installed runtime was compiled from, so that converter and runtime cannot drift apart.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tasks.convert import windows
from tasks.errors import StageError
from tasks.frame import crashes
from tasks.frame.environment import OFFLINE
from tasks.frame.events import progress
from tasks.frame.stage import disk_full, need_space, require_file
from tasks.params import Params

CONVERTER = Path("share") / "llama.cpp" / "convert_hf_to_gguf.py"  # below sys.prefix


def convert(params: Params, *, teacher: Path, student: Path, out: Path) -> dict[str, float]:
    """Write `teacher.gguf` and `student.gguf` into `out`; return their sizes in bytes.

    Raises:
        ArtifactError: an input has no model.
        StageError: the converter is not installed, refuses the model, or the disk is full.
    """
    converter = Path(sys.prefix) / CONVERTER
    if not converter.is_file():
        raise StageError(f"{converter} is missing: run `make setup`, which unpacks it from llama-cpp-python's source")
    folders = {"teacher": teacher / "model", "student": student / "model"}
    for folder in folders.values():
        require_file(folder / "config.json", "run the stage that makes this model again")
    need_space(out, sum(_weights(folder) for folder in folders.values()))

    # Most of a conversion of a small model is the start of its interpreter: run both at once.
    running = {name: _start(converter, folder, out / f"{name}.gguf") for name, folder in folders.items()}
    try:
        with progress("convert to GGUF", len(running), "models") as advance:
            for name, process in running.items():
                log = process.communicate()[0]
                if crashes.signal_of(process.returncode):
                    raise crashes.error_for(f"llama.cpp's converter, on the {name},", process.returncode, log, out)
                if process.returncode != 0:
                    raise _failure(name, folders[name], out, log)
                require_file(out / f"{name}.gguf", "the converter ended well yet wrote no file")
                if sliding := windows.moved(json.loads((folders[name] / "config.json").read_bytes())):
                    windows.tell(out / f"{name}.gguf", sliding)
                advance(1, name)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    return {f"{name}_bytes": float((out / f"{name}.gguf").stat().st_size) for name in folders}


def _weights(folder: Path) -> int:
    """Bytes of F16 weights and vocabulary to expect: bf16 safetensors are as large, and 5 % for the rest."""
    files = [*folder.glob("*.safetensors"), *folder.glob("tokenizer*")]
    return int(1.05 * sum(file.stat().st_size for file in files))


def _start(converter: Path, model: Path, target: Path) -> "subprocess.Popen[str]":
    # The model's name would else be guessed from its path, and paths differ between equal runs.
    command = [sys.executable, str(converter), str(model), "--outfile", str(target), "--outtype", "f16"]
    env = {**os.environ, **OFFLINE, "PYTHONPATH": str(converter.parent / "gguf-py")}
    return subprocess.Popen(
        [*command, "--model-name", "model"], env=env, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _failure(name: str, model: Path, out: Path, log: str) -> StageError:
    if "No space left on device" in log:
        return disk_full(out)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    reason = " | ".join(lines[-2:]).removeprefix("ERROR:hf-to-gguf:") or "it said nothing"
    return StageError(
        f"llama.cpp's converter refused the {name} in {model}: {reason}: choose a model that this llama.cpp supports, or install a newer llama-cpp-python"
    )
