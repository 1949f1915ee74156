from tasks.toys import work, write


def acquire(params, *, out, **rest):
    metrics = work("acquire")
    data = {"source": "toy", "sha256": {"train.jsonl": "0" * 64}, "rows": {"train": 3}}
    write(out / "lineage.json", {"model": {}, "data": data})
    return metrics
