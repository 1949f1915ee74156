"""Accuracy: the greedy answers of the shipped file to the test rows."""

import math
from typing import Any

from tasks.models import scoring
from tasks.validate.shipped import Shipped


def evaluate(shipped: Shipped) -> dict[str, Any]:
    """`accuracy`, its ratio to the teacher's, and accuracy `per_group` of rows."""
    correct = [line["correct"] for line in shipped.predictions]
    references = [line["reference"] for line in shipped.predictions]
    accuracy, teacher = scoring.accuracy(correct), scoring.accuracy(shipped.taught)
    return {
        "accuracy": accuracy,
        "accuracy_retention": accuracy / teacher if teacher else math.nan,
        "per_group": scoring.per_group(references, correct),
    }
