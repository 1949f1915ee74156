from tasks.toys import work, write


def teach(params, *, out, **rest):
    metrics = work("teach")
    write(out / "answers.jsonl", {})
    return metrics
