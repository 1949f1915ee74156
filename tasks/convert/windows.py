"""Say in a GGUF file which blocks look back over a window only; llama.cpp else goes by their places.

Gemma's blocks are of two kinds, with rotary embeddings of their own. Its converter leaves out which is which, since in
a whole model the last of every six (Gemma 2: of two) sees everything. Pruning moves them to other places.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PERIOD: Mapping[str, int] = {"gemma2": 2, "gemma3_text": 6}  # as llama.cpp has it (src/models/gemma2.cpp, gemma3.cpp)


def moved(config: Mapping[str, Any]) -> list[bool] | None:
    """Whether each block has a window; None where llama.cpp needs not be told."""
    kinds, period = config.get("layer_types"), PERIOD.get(str(config.get("model_type")))
    if not kinds or not period:
        return None
    sliding = [kind == "sliding_attention" for kind in kinds]
    return None if sliding == [(i + 1) % period != 0 for i in range(len(sliding))] else sliding


def tell(path: Path, sliding: list[bool]) -> None:
    """Write `sliding` into the file's metadata."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader, fresh = GGUFReader(path), path.with_suffix(".new")
    architecture = reader.fields[Keys.General.ARCHITECTURE].contents()
    key = Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=architecture)
    writer = GGUFWriter(fresh, arch=architecture)
    copy_with_new_metadata(reader, writer, {key: MetadataDetails(GGUFValueType.ARRAY, sliding)}, [])
    fresh.replace(path)
