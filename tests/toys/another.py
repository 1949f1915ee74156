from tasks.toys import work


def another(params, *, out, **rest):
    metrics = work("another")
    return metrics
