"""KL divergence at equal bytes: `auto-q4_0` and `auto-q4_k_m` against llama.cpp's quantizer with an importance matrix.

    python benchmarks/bits.py [--root CHECKOUT] [--windows 8] [--dither]

On the student of a finished run. Both sides see the same training rows, and are held against the same F16 file on the test rows,
window by window. `--dither` first adds noise of a step of a Q4_1 grid to every matrix, as large as what the model lost when its
source was quantized: so weights lie on no grid, as those of most models. The importance matrix goes to llama.cpp's own
quantizer in this process, which is what `llama-quantize --imatrix` does with the same numbers. Prints a table; exit code 1
where a file has more bytes than its peer, or more than 0.6 of its divergence.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tasks.convert.stage import CONVERTER  # noqa: E402
from tasks.frame.cores import available  # noqa: E402
from tasks.models import chat, loading  # noqa: E402
from tasks.quantize import ggml_types, gguf_auto  # noqa: E402
from tasks.quantize.inputs import Inputs  # noqa: E402
from tasks.quantize.options import GgmlTypes, GgufAuto  # noqa: E402
from tasks.runtimes import llama  # noqa: E402
from tasks.validate import likelihood  # noqa: E402

CONTEXT, WANTED = 512, 0.6
BLOCK, LEVELS = 32, 15  # of Q4_1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="a checkout with a finished run (default: here)")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--dither", action="store_true")
    args = parser.parse_args()
    build = args.root.resolve() / "build"
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        inputs = Inputs(build / "select" / "model", build / "convert" / "student.gguf", build / "acquire" / "data")
        if args.dither:
            inputs = dithered(inputs, home)
        windows = test_windows(inputs, args.windows)
        found = {
            label: (file.stat().st_size, divergence(inputs.f16, file, windows)) for label, file in made(inputs, home)
        }
    print(f"{'file':<22}{'MB':>8}{'mean KLD':>11}{'of the peer':>13}")
    missed = False
    for label, (size, kld) in found.items():
        share = ""
        if label.startswith("auto-"):
            peer = found[f"{label.removeprefix('auto-')}, importance"]
            plain = found[label.removeprefix("auto-")]
            share = f"{kld / peer[1]:.2f}"
            missed |= kld > WANTED * peer[1] or size > plain[0] + 2000  # of metadata
        print(f"{label:<22}{size / 1e6:>8.1f}{kld:>11.4f}{share:>13}")
    return int(missed)


def made(inputs: Inputs, home: Path) -> Iterator[tuple[str, Path]]:
    """Each file with its label."""
    for base in ("q4_0", "q4_k_m"):
        for label, module, variant, options in (
            (base, ggml_types, base, GgmlTypes()),
            (f"{base}, importance", ggml_types, base, GgmlTypes(importance=True)),
            (f"auto-{base}", gguf_auto, f"auto-{base}", GgufAuto()),
        ):
            out = home / label
            out.mkdir()
            module.quantize(variant, options, inputs, out)
            yield label, out / "model.gguf"


def dithered(inputs: Inputs, home: Path) -> Inputs:
    """The same student with uniform noise as wide as a step of the grid that each 32 weights span in Q4_1."""
    import torch

    model, tokenizer = loading.load_model(inputs.student, "float32"), loading.load_tokenizer(inputs.student)
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2 and weight.shape[1] % BLOCK == 0:
                blocks = weight.view(-1, BLOCK)
                step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / LEVELS
                blocks.add_(step * (torch.rand(blocks.shape, generator=generator) - 0.5))
    student, f16 = home / "dithered", home / "dithered.gguf"
    loading.save(model, tokenizer, student)
    command = [sys.executable, Path(sys.prefix) / CONVERTER, student, "--outfile", f16, "--outtype", "f16"]
    subprocess.run(command, check=True, capture_output=True)
    return Inputs(student, f16, inputs.data)


def test_windows(inputs: Inputs, count: int) -> list[Any]:
    """Windows of the test conversations, as `validate` takes them where no text came with the data."""
    tokenizer = loading.load_tokenizer(inputs.student)
    rows = chat.read_rows(inputs.data / "test.jsonl")
    tokens = [token for row in rows for token in likelihood._whole(tokenizer, row)]
    return likelihood.split(tokens, CONTEXT, count, None)


def divergence(f16: Path, file: Path, windows: list[Any]) -> float:
    """Mean KLD from the F16 file, in nats."""
    with (
        llama.window_logits(f16, CONTEXT, available()) as base,
        llama.window_logits(file, CONTEXT, available()) as ours,
    ):
        return likelihood.compare(base, ours, windows).mean_kld


if __name__ == "__main__":
    sys.exit(main())
