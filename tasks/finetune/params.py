"""The section `finetune`."""

from tasks.learning.params import Training


class Finetune(Training):
    enabled: bool = True
    seed: int = 17
