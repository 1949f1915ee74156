"""Speed and memory of one variant within the limits of one device profile, beside the teacher's F16 file.

What comes out differs from run to run and from machine to machine, so measurements.json is not hashed. Whether it is good
enough, `judge` says.
"""

from pathlib import Path

from tasks import profiles
from tasks.frame.cores import quiet
from tasks.frame.events import doing, note
from tasks.frame.stage import require_file, write_json
from tasks.measure import machine
from tasks.measure.speed import OverMemory
from tasks.measure.speed import measure as measured
from tasks.models import chat, loading
from tasks.params import Params
from tasks.variants import VARIANTS


def measure(
    params: Params, *, root: Path, source: Path, student: Path, converted: Path, artifact: Path,
    variant: str, profile: str, out: Path,
) -> dict[str, float]:  # fmt: skip
    """Write limits.json and measurements.json into `out`. A file that does not run within the limits is a result, too:
    `ended` says why it has no numbers.

    Raises:
        ConfigError: there is no such profile, or it is wrong.
        ArtifactError: an input is missing.
        StageError: a process dies.
    """
    row, limits = VARIANTS[variant], profiles.load(root, profile).limits
    write_json(out / "limits.json", limits.model_dump(mode="json"))
    facts = {"machine": machine.facts()}
    if not limits.has(row.runtime):
        write_json(out / "measurements.json", {"ended": f"the device does not have {row.runtime.label}", **facts})
        return {}
    file = require_file(artifact / row.runtime.mark, f"run quantize {variant} again") and row.weights(artifact)
    yardstick = require_file(converted / "teacher.gguf", "run the convert stage again")
    rows = chat.read_rows(source / "data" / "test.jsonl")
    middle = sorted(rows, key=lambda each: len(str(each)))[len(rows) // 2]
    prompt = chat.prompt_ids(loading.load_tokenizer(student / "model"), middle[:-1])
    doing("wait for the other variants' work")
    with quiet(artifact.parent):
        doing("measure speed and memory")
        try:
            numbers = measured(row.runtime, file, yardstick, prompt, params.measure.repeats, limits)
        except OverMemory as over:
            ended = f"it held {over.peak / 1e6:,.0f} MB of memory, more than the device's {limits.memory_mb:,} MB, and was ended"
            note(f"{variant} on {profile}: {ended}")
            numbers = {"ended": ended, "peak_rss_bytes": over.peak}
    write_json(out / "measurements.json", numbers | facts)
    return {}
