"""One student of several: a seed decides which rows a student sees, in what order, and some make a better one by chance.

The validation loss decides. The test split has no part in it: a student that is chosen for its luck on the rows that
judge it would look better than it is. What the students reach there is told as their mean and spread.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from tasks.frame import events, manifest
from tasks.frame.stage import place
from tasks.params import Params


def select(params: Params, *, students: Path, out: Path) -> dict[str, float]:
    """Hand on the student of the least validation loss, the first of equals.

    Writes what `distill` wrote of it, and `students.json`: `seed`, `validation_loss` (nats a token), `accuracy` and
    `chosen` of each.
    """
    students_made: list[dict[str, Any]] = []
    for seed in params.select.seeds:
        metrics = manifest.load(students / str(seed)).metrics
        students_made.append({"seed": seed} | {name: metrics[name] for name in ("validation_loss", "accuracy")})
    best = min(students_made, key=lambda each: each["validation_loss"])
    chosen = students / str(best["seed"])
    for name in manifest.load(chosen).files:
        place(chosen / name, out / name)
    for each in students_made:
        each["chosen"] = each is best
    (out / "students.json").write_text(json.dumps(students_made, indent=1) + "\n")
    accuracies = [each["accuracy"] for each in students_made]
    spread = statistics.stdev(accuracies) if len(students_made) > 1 else 0.0
    mean = statistics.fmean(accuracies)
    if len(students_made) > 1:
        events.note(
            f"seed {best['seed']} goes on, of {len(students_made)}: validation loss {best['validation_loss']:.4f}, accuracy "
            f"{best['accuracy']:.3f}; all have {mean:.3f} on average, with a standard deviation of {spread:.3f}"
        )
    return {
        "students": float(len(students_made)),
        "seed": float(best["seed"]),
        "validation_loss": best["validation_loss"],
        "accuracy": best["accuracy"],
        "accuracy_mean": round(mean, 6),
        "accuracy_sd": round(spread, 6),
    }
