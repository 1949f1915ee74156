"""What the report is made from, as the stages write it, with texts that must stay text."""

import json
from pathlib import Path

from tasks.package import bundle

SIZES = {"q8_0": 0.41, "q5_1": 0.33, "q4_k_m": 0.31, "q4_0": 0.27, "onnx-int4": 0.44}


HOSTILE = '<script>alert("x")</script>'


MACHINE = {
    "processor": "Some " + HOSTILE, "instructions": ["avx2"], "cores": 2, "memory_bytes": 8_000_000_000, "system": "Linux",
}  # fmt: skip
DESKTOP = {"label": "Desktop", "memory_mb": None, "threads": None, "context": 512, "runtimes": None}
PHONE = {"label": "Phone " + HOSTILE, "memory_mb": 400, "threads": 4, "context": 512, "runtimes": ["llama"]}


def variant(name: str) -> dict:
    at = list(SIZES).index(name)
    verdict = {"q4_0": "fail", "onnx-int4": "undecided"}.get(name, "pass")
    retention = 1.0 - 0.012 * at
    check = {
        "name": "accuracy_retention",
        "value": retention,
        "limit": 0.96,
        "direction": "at_least",
        "ok": verdict != "fail",
    }
    check |= {"interval": [retention - 0.04, retention + 0.03], "undecided": verdict == "undecided"}
    classes = {"light_on": 0.97 - at / 50, "set_temperature": 0.91 - at / 30, "decline": 0.82 - at / 40}
    speed = {
        "decode_tokens_per_s": 178 + 14 * at,
        "ttft_p50_s": 0.041 - at / 400,
        "ttft_p95_s": 0.048,
        "ttft_p99_s": 0.061,
    }
    measurements = speed | {
        "load_s": 0.12, "prefill_tokens_per_s": 919.0, "peak_rss_bytes": 2.1e8 + 1e7 * at, "decode_speedup": 1.26,
        "peak_rss_ratio": 0.62, "threads": 2, "machine": MACHINE,
        "reference": {"decode_tokens_per_s": 141.0, "ttft_p50_s": 0.05, "ttft_p95_s": 0.06, "ttft_p99_s": 0.08},
    }  # fmt: skip
    judged = {"verdict": verdict, "checks": [check], "device": DESKTOP}
    if name == "q4_k_m":
        small = {"verdict": judged | {"device": PHONE}, "measurements": measurements}
    else:
        ended = {"ended": "it held 420 MB " + HOSTILE}
        failed = {"verdict": "fail", "checks": [check], "device": PHONE, **ended}
        small = {"verdict": failed, "measurements": {**ended, "peak_rss_bytes": 4.2e8, "machine": MACHINE}}
    return {
        "runtime": "onnx_genai" if "onnx" in name else "llama",
        "targets": [],
        "device": "desktop",
        "metrics": {
            "accuracy": 0.87 * retention, "accuracy_retention": retention, "perplexity": 18 + at, "mean_kld": 0.004 * 3**at,
            "perplexity_ratio": 1 + at / 30, "same_top_token": 0.96 - at / 18, "size_bytes": SIZES[name] * 271e6,
            "size_ratio": SIZES[name], "per_group": classes, "accuracy_interval": [0.8, 0.9], "scored_tokens": 6144, "unheard_of": 7,
        },
        "devices": {
            "desktop": {"verdict": judged, "measurements": measurements},
"phone": small,
        },
    }  # fmt: skip


def sample(root: Path, chosen: str | None = "q4_k_m", name: str = "home-commands") -> tuple[Path, Path]:
    """A package and a select folder as the stages write them."""
    package, student, finetune = (root / stage for stage in ("package", "select", "finetune"))
    for folder in (package, student, finetune):
        folder.mkdir(parents=True)
    variants = {each: variant(each) for each in SIZES}
    reason = "q4_k_m is the smallest of the 3 variants that passed. " + HOSTILE
    evaluation = {
        n: bundle.Evaluation(verdict=v["devices"]["desktop"]["verdict"]["verdict"], metrics=v["metrics"])
        for n, v in variants.items()
    }
    lineage = {
        "model": {"source": "package", "sha256": "ab" * 32, "architecture": "LlamaForCausalLM"},
        "data": {"rows": {"train": 1500}},
    }
    bundle.write(package, bundle.Bundle(
        name=name, chosen=chosen, reason=reason, variants={n: [] for n in variants}, targets={}, files={},
        minimum_ram_bytes=343_000_000 if chosen else None, runtimes={"llama-cpp-python": "0.3.36"},
        licence=bundle.Licence(model="apache-2.0", data="CC-BY-4.0"), lineage=lineage, evaluation=evaluation,
        created_from={"source": "cd" * 32, "artifacts/q4_k_m": "ef" * 32},
    ))  # fmt: skip
    devices = {
        "desktop": {"variant": chosen, "reason": reason},
        "phone": {"variant": chosen, "reason": "q4_k_m is the only one that passed every gate of it (84.0 MB)."},
    }
    report = {
        "name": name, "rule": "smallest", "chosen": chosen, "reason": reason, "devices": devices, "variants": variants,
    }  # fmt: skip
    (package / "report.json").write_text(json.dumps(report))
    models = {
        each: {"accuracy": a, "parameters": p, "layers": n, "per_group": {"light_on": a, "set_temperature": a * 0.9, "decline": a**2}}
        for each, a, p, n in (
            ("base", 0.0, 134_515_008, 30), ("teacher", 0.884, 134_515_008, 30), ("pruned", 0.215, 113_000_000, 24),
            ("distilled", 0.871, 113_000_000, 24),
        )
    }  # fmt: skip
    (student / "models.json").write_text(json.dumps(models))
    curve = [
        {"step": s, "loss": 1.4 * 0.97**s + 0.02, "validation_loss": 1.1 * 0.975**s + 0.06} for s in range(20, 220, 40)
    ]
    for folder in (student, finetune):
        (folder / "history.json").write_text(json.dumps(curve))
    return package, student
