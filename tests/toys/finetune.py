from tasks.toys import work, write


def finetune(params, *, out, **rest):
    metrics = work("finetune")
    write(out / "history.json", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    return metrics
