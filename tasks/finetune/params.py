"""The section `finetune`."""

from pydantic import Field

from tasks.learning.params import Training


class Finetune(Training):
    """How the acquired model learns the task. The result is the teacher."""

    enabled: bool = Field(
        True, description="Whether the model is fine-tuned. False: the acquired model is the teacher."
    )
    seed: int = Field(17, description="Seed of the training, which decides the order of the rows.")
