"""The teacher learns the task: supervised fine-tuning on the assistant's turns."""

import json
from pathlib import Path

from tasks.frame import events
from tasks.frame.stage import place
from tasks.learning.training import cross_entropy, train, validation_loss
from tasks.models import loading
from tasks.models.chat import encoded_split
from tasks.params import Params


def finetune(params: Params, *, source: Path, out: Path, scratch: Path) -> dict[str, float]:
    """Fine-tune the acquired model on the training split; when switched off, hand it on as it is.

    Writes `model/` and `history.json`. Raises what `train` raises, and ConfigError for an over-long row.
    """
    settings, task = params.finetune, params.task
    if not settings.enabled:
        events.note("finetune is off: the acquired model is the teacher")
        for file in (source / "model").iterdir():
            place(file, out / "model" / file.name)
        (out / "history.json").write_text("[]\n")
        return {"steps": 0.0}
    events.doing("load libraries and rows")
    tokenizer = loading.load_tokenizer(source / "model")
    rows = encoded_split(tokenizer, source, "train", task.max_length)
    validation = encoded_split(tokenizer, source, "validation", task.max_length)
    events.doing("load the model")
    model = loading.load_model(source / "model", loading.arithmetic(settings.precision))  # its weights are bf16
    events.doing("loss before training")
    before = validation_loss(model, validation)
    history = train(model, rows, validation, settings, cross_entropy(model), scratch, "finetune", seed=settings.seed)
    events.doing("save the model")
    loading.save(model, tokenizer, out / "model")
    (out / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    return {
        "steps": history[-1]["step"],
        "loss": history[-1]["loss"],
        "validation_loss_before": round(before, 6),
        "validation_loss": min(entry["validation_loss"] for entry in history),
    }
