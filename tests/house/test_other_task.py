"""Someone else's data: one JSONL file of a classification task and a few lines of params.yaml."""

import json
from pathlib import Path

import yaml

from tasks import params
from tasks.frame.stage import run
from tasks.stages import STAGES

WORDS = {"positive": ["great", "lovely", "superb", "fine"], "negative": ["awful", "broken", "poor", "bad"]}
THINGS = ["phone", "lamp", "chair", "hotel", "train", "soup", "book", "garden"]
LINES = {  # six lines of params.yaml
    "acquire": {"data": {"source": "local", "path": "data/reviews.jsonl", "test": 0.25}},
    "task": {"metric": "text"},
    "finetune": {"epochs": 8.0},
    "package": {"name": "reviews"},
}


def test_a_classification_file_runs_to_verdicts(tiny_workspace: Path) -> None:
    rows = [
        {"prompt": f"{thing}: {word}. Positive or negative?", "completion": label}
        for label, words in WORDS.items()
        for word in words
        for thing in THINGS
    ]
    (tiny_workspace / "data/reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = yaml.safe_load((tiny_workspace / "params.yaml").read_text())
    for section, changes in LINES.items():
        raw[section] |= changes
    values = params.check(raw, "params.yaml")
    variants = values.quantize.variants
    # But `package`, which refuses: llama.cpp does not know how the tiny model's tokenizer splits text.
    for each in (stage for name, stage in STAGES.items() if name != "package"):
        for item in each.items(values):
            run(each, STAGES, values, tiny_workspace, *item.words)
    sizes = {
        split: len((tiny_workspace / f"build/acquire/data/{split}.jsonl").read_text().splitlines())
        for split in ("train", "validation", "test")
    }
    assert sum(sizes.values()) == 64
    assert all(sizes.values())
    report = json.loads((tiny_workspace / "build/select/models.json").read_text())
    assert set(report["teacher"]["per_group"]) == {"positive", "negative"}
    # A tiny untrained model learns to answer with a label at all; which of the two is more than it can learn here.
    assert report["base"]["accuracy"] == 0.0
    assert report["teacher"]["accuracy"] >= 0.3
    for variant in variants:
        metrics = json.loads((tiny_workspace / f"build/validate/{variant}/metrics.json").read_text())
        assert set(metrics["per_group"]) == {"positive", "negative"}
