from tasks.toys import work, write


def prune(params, *, out, **rest):
    metrics = work("prune")
    write(out / "pruning.json", {})
    return metrics
