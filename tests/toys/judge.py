from tasks.toys import VERDICT, work, write


def judge(params, *, variant, profile, out, **rest):
    metrics = work(f"judge-{variant}-{profile}")
    write(out / "verdict.json", VERDICT)
    return metrics
