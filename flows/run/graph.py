"""What a run does and in what order: every stage, once or once an item, and what each needs. Pure."""

from collections.abc import Collection

from flows.workspace.versioning import address
from tasks.frame.items import Item
from tasks.params import Params
from tasks.stages import STAGES

Key = tuple[str, Item]  # stage, and what it is done for


def keys(checked: Params) -> list[Key]:
    """Everything that a run does, in order."""
    return [(stage.name, item) for stage in STAGES.values() for item in stage.items(checked)]


def inputs(key: Key, checked: Params) -> list[Key]:
    """What must be done before."""
    name, item = key
    stage = STAGES[name]
    sources = stage.inputs.values()
    return [(source, each) for source in sources for each in stage.feeding(STAGES[source], item, checked)]


def behind(changed: Collection[str], checked: Params) -> set[Key]:
    """What is out of date, or follows from what is. `changed`: DVC's names. All else needs no call of DVC."""
    outdated: set[Key] = set()
    for key in keys(checked):
        if address(key[0], *key[1].words) in changed or outdated & set(inputs(key, checked)):
            outdated.add(key)
    return outdated


def title(key: Key) -> str:
    """`distill-17`, `quantize-q4_0`: of the task, its log and its line on the terminal."""
    stage, item = key
    return "-".join((stage, *item.words))
