from tasks.toys import BUNDLE, MEASURED, METRICS, VERDICT, WEIGHTS, work, write


def package(params, *, out, **rest):
    metrics = work("package")
    (out / "llama-server").mkdir()
    (out / "llama-server" / "model.gguf").write_bytes(WEIGHTS)
    write(out / "bundle.json", BUNDLE)
    judged = {"metrics": METRICS, "measurements": MEASURED, "verdict": VERDICT}
    write(out / "report.json", {"reason": "toys pass", "variants": {"q4_0": judged, "q8_0": judged}})
    return metrics
