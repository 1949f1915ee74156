"""What llama.cpp makes of each tensor in each type, foreseen: by rows, layers, and how many queries share a key."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tasks.models import sizes
from tasks.quantize import ggml_types
from tasks.quantize.inputs import Inputs
from tasks.quantize.options import GgmlTypes
from tasks.variants import LLAMA, QUANTIZERS

TYPES = [name for name in QUANTIZERS["ggml_types"].variants if name != "f16"]


@dataclass(frozen=True)
class Model:
    """A model of random weights."""

    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    tied: bool


MODELS = {
    "rows of blocks, four queries a key": Model("llama", 256, 512, 17, 8, 2, tied=True),
    "rows of no block, a key each": Model("llama", 96, 160, 9, 4, 4, tied=False),
    "one side of blocks": Model("llama", 192, 768, 8, 6, 2, tied=True),
    "fused": Model("phi3", 256, 512, 9, 4, 4, tied=False),
}


@pytest.fixture(scope="module", params=MODELS)
def f16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[sizes.Shape, Path]:
    import gguf

    model = MODELS[request.param]
    shape = sizes.from_config(
        {
            "model_type": model.kind, "hidden_size": model.hidden, "intermediate_size": model.inner,
            "num_hidden_layers": model.layers, "num_attention_heads": model.heads, "num_key_value_heads": model.groups,
            "vocab_size": 300, "tie_word_embeddings": model.tied,
        }
    )  # fmt: skip
    path = tmp_path_factory.mktemp("types") / "f16.gguf"
    writer = gguf.GGUFWriter(path, model.kind)
    writer.add_context_length(64)
    writer.add_block_count(model.layers)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(model.hidden // model.heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(300)
    random = np.random.default_rng(0)
    for tensor in shape.tensors:
        rows = (tensor.elements // tensor.row, tensor.row) if tensor.matrix else (tensor.row,)
        data = random.normal(0, 0.02, rows).astype(np.float16 if tensor.matrix else np.float32)
        writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return shape, path


@pytest.mark.parametrize("variant", TYPES)
def test_every_tensor_has_the_foreseen_type(f16: tuple[sizes.Shape, Path], variant: str, tmp_path: Path) -> None:
    from gguf import GGUFReader

    shape, source = f16
    ggml_types.quantize(variant, GgmlTypes(), Inputs(tmp_path, source, tmp_path), tmp_path)
    file = tmp_path / LLAMA.weights
    reader = GGUFReader(file)
    made = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert made == {tensor.name: ggml_types.type_of(tensor, variant, shape) for tensor in shape.tensors}
    weights = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert ggml_types.predicted_size(variant, None, shape) - shape.header == weights
    assert file.stat().st_size <= ggml_types.most_bytes(variant, source.stat().st_size) + 1_000_000
