"""Every number of a shipped file in one table: name, label, how it is shown, which way is better, what computes it.

Gates, report, model card, terminal, Prefect's page, MLflow and the comparison of versions read it. To add a metric: a
module of `tasks/validate` with `evaluate(shipped)`, and its row here, which names the module.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


def number(value: float) -> str:
    """Three significant digits, or an integer as it is; thousands grouped."""
    if not math.isfinite(value):
        return "-"
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def percent(value: float) -> str:
    """A share of 1."""
    return f"{value * 100:.1f} %"


def megabytes(value: float) -> str:
    """Bytes."""
    return f"{value / 1e6:,.1f} MB"


def milliseconds(value: float) -> str:
    """Seconds."""
    return f"{number(value * 1e3)} ms"


@dataclass(frozen=True)
class Metric:
    """One number. `better`: None where it says nothing of the file, and no gate may rest on it. `measured`: it differs from
    run to run and from machine to machine; the others are the same wherever the same work is done.
    """

    name: str
    label: str
    shown_as: Callable[[float], str]
    better: Literal["higher", "lower"] | None
    computed_by: str  # a module of tasks/validate, of tasks/measure where it is measured
    measured: bool = False
    column: str = ""  # its heading in the short tables of a run; "": it is not in them

    def show(self, value: Any) -> str:
        """The number for a person; a dash where there is none."""
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return self.shown_as(value) if known else "-"


_ROWS = (
    Metric("accuracy", "Accuracy", percent, "higher", "answers", column="accuracy"),
    Metric("accuracy_retention", "Accuracy, of the teacher's", percent, "higher", "answers", column="of the teacher's"),
    Metric("perplexity", "Perplexity", number, "lower", "likelihood"),
    Metric("perplexity_ratio", "Perplexity, ratio to F16", lambda v: f"{v:.4f}", "lower", "likelihood"),
    Metric("mean_kld", "Mean KLD from F16", lambda v: f"{v:.4f}", "lower", "likelihood", column="mean KLD"),
    Metric("same_top_token", "Same top token as F16", percent, "higher", "likelihood"),
    Metric("size_bytes", "Size", megabytes, "lower", "file_size", column="size"),
    Metric("size_ratio", "Size, of the teacher's F16", percent, "lower", "file_size"),
    Metric("reference_perplexity", "Perplexity of F16", number, None, "likelihood"),
    Metric("context", "Tokens of a perplexity window", number, None, "likelihood"),
    Metric("scored_tokens", "Tokens scored", number, None, "likelihood"),
    Metric("load_s", "Load time", milliseconds, "lower", "speed", measured=True),
    Metric("ttft_p50_s", "Time to first token, p50", milliseconds, "lower", "speed", measured=True),
    Metric("ttft_p95_s", "Time to first token, p95", milliseconds, "lower", "speed", measured=True),
    Metric("ttft_p99_s", "Time to first token, p99", milliseconds, "lower", "speed", measured=True),
    Metric("prefill_tokens_per_s", "Prefill, tokens/s", number, "higher", "speed", measured=True),
    Metric("decode_tokens_per_s", "Decode, tokens/s", number, "higher", "speed", measured=True, column="tokens/s"),
    Metric("decode_speedup", "Decode, times the teacher's F16", lambda v: f"{v:.2f}", "higher", "speed", measured=True),
    Metric("peak_rss_bytes", "Peak memory", megabytes, "lower", "speed", measured=True),
    Metric("peak_rss_ratio", "Peak memory, of the teacher's F16", percent, "lower", "speed", measured=True),
    Metric("prompt_tokens", "Tokens of a timed prompt", number, None, "speed", measured=True),
    Metric("threads", "Threads", number, None, "speed", measured=True),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ROWS}
GATED = tuple(metric.name for metric in _ROWS if metric.better)  # what a gate may name
COLUMNS = tuple(metric for metric in _ROWS if metric.column)  # of the short tables of a run


def show(name: str, value: Any) -> str:
    """A number by its name, one that is not in the table as well as may be."""
    return METRICS.get(name, Metric(name, name, number, None, "")).show(value)
