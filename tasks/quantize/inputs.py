"""What a quantizer may read."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Inputs:
    """The student as a Hugging Face folder and as an F16 GGUF, and the data that it learned from: `train.jsonl` and others."""

    student: Path
    f16: Path
    data: Path
