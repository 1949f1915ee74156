"""What fine-tuning and distillation have in common in their sections."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.schema import Positive, Rate, Section


class Training(Section):
    """Hyper-parameters that fine-tuning and distillation share."""

    epochs: Annotated[float, Field(gt=0, description="passes over the rows, cut where `most_rows` are read")]
    most_rows: Positive | None = Field(None, description="rows read over all epochs, at most; none: no limit")
    learning_rate: Rate
    batch_tokens: Annotated[int, Field(ge=16)] = Field(1024, description="unpadded tokens of an optimiser step")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of the steps")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="gradient norm")
    freeze_embeddings: bool = Field(True, description="leave the (tied) embedding as it is: faster, forgets less")
    evaluations: Positive = Field(4, description="validation passes over the run; the best one is kept")
    patience: Positive = Field(2, description="validation passes without improvement before stopping")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: the faster one of this machine")

    def passes(self, rows: int) -> float:
        """Epochs over so many rows, with `most_rows` kept to."""
        return min(self.epochs, self.most_rows / rows) if self.most_rows else self.epochs
