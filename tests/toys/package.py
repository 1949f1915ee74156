import hashlib

from tasks.toys import MEASURED, METRICS, VERDICT, work, write

WEIGHTS = b"toy"
BUNDLE = {
    "name": "home-commands",
    "chosen": "q4_0",
    "reason": "toys pass",
    "variants": {"q4_0": ["llama-server"], "q8_0": []},
    "targets": {
        "llama-server": {
            "variant": "q4_0", "runtime": "llama-cpp-python", "minimum_ram_bytes": 1, "context_length": 512,
            "conversations_checked": 1, "notes": [],
        }
    },
    "files": {"llama-server/model.gguf": {"sha256": hashlib.sha256(WEIGHTS).hexdigest(), "size": len(WEIGHTS)}},
    "minimum_ram_bytes": 1,
    "runtimes": {},
    "licence": {"model": "apache-2.0", "data": "apache-2.0"},
    "lineage": {},
    "evaluation": {name: {"verdict": "pass", "devices": {"desktop": "pass"}, "metrics": {}} for name in ("q4_0", "q8_0")},
    "created_from": {},
}  # fmt: skip


def package(params, *, out, **rest):
    metrics = work("package")
    (out / "llama-server").mkdir()
    (out / "llama-server" / "model.gguf").write_bytes(WEIGHTS)
    write(out / "bundle.json", BUNDLE)
    devices = {"desktop": {"verdict": VERDICT, "measurements": MEASURED}}
    judged = {"metrics": METRICS, "device": "desktop", "devices": devices}
    best = {"desktop": {"variant": "q4_0", "reason": "toys pass"}}
    write(out / "report.json", {"reason": "toys pass", "devices": best, "variants": {"q4_0": judged, "q8_0": judged}})
    return metrics
