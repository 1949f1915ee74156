"""What fine-tuning and distillation have in common in their sections."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.schema import Positive, Rate, Section


class Training(Section):
    """Hyper-parameters that fine-tuning and distillation share."""

    epochs: Annotated[float, Field(gt=0)] = Field(
        description="Passes over the training rows. They end earlier where `most_rows` are read."
    )
    most_rows: Positive | None = Field(None, description="Rows read over all epochs, at most. None: no limit.")
    learning_rate: Rate = Field(
        description="Highest learning rate of AdamW. It rises to it (`warmup`) and falls by a cosine to a tenth of it."
    )
    batch_tokens: Annotated[int, Field(ge=16)] = Field(
        1024,
        description="Tokens of an optimiser step, at most, padding included. A longer row makes a step of its own.",
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="Share of the steps in which the learning rate rises."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="Decoupled weight decay of AdamW.")
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="Norm to which the gradient of a step is clipped.")
    freeze_embeddings: bool = Field(
        True, description="Whether the embedding and the output layer stay as they are: faster, and less is forgotten."
    )
    evaluations: Positive = Field(
        4, description="Validation passes, evenly spread over the steps. The weights of the best one are kept."
    )
    patience: Positive = Field(2, description="Validation passes without improvement after which training stops.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Type to compute in. `auto`: the faster one on this machine. Master weights are float32 in any case.",
    )

    def passes(self, rows: int) -> float:
        """Epochs over so many rows, with `most_rows` kept to."""
        return min(self.epochs, self.most_rows / rows) if self.most_rows else self.epochs
