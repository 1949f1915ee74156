from tasks.toys import MEASURED, METRICS, work, write


def validate(params, *, variant, out, **rest):
    metrics = work(f"validate-{variant}")
    write(out / "metrics.json", METRICS)
    write(out / "measurements.json", MEASURED)
    return metrics
