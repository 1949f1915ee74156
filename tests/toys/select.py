from tasks.toys import work


def select(params, *, students, out, **rest):
    metrics = work("select")
    chosen = students / str(params.select.seeds[0])
    for name in ("history.json", "models.json"):
        (out / name).write_bytes((chosen / name).read_bytes())
    return metrics
