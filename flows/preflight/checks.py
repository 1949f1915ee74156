"""What can be known of a run before its work: steps that the model's architecture does not allow."""

from flows.preflight import planned_model
from flows.workspace.paths import Workspace
from tasks import profiles
from tasks.errors import ConfigError
from tasks.models import supports
from tasks.params import Params
from tasks.runtimes import environments
from tasks.variants import VARIANTS


def check(root: Workspace, checked: Params) -> None:
    """Refuse a run that would fail after its training.

    Raises:
        ConfigError: a device profile is missing or wrong; a runtime is not installed; or it names every step that cannot be done, with what to change.
    """
    for name in checked.measure.profiles:
        profiles.load(root, name)
    used = {VARIANTS[variant].runtime.name: VARIANTS[variant].runtime for variant in checked.quantize.variants}
    if absent := [why for runtime in used.values() if (why := environments.missing(runtime))]:
        raise ConfigError("; ".join(absent))
    kind = planned_model.architecture(checked.acquire, root)
    obstacles = problems(kind, checked.prune.max_parameters, checked.quantize.variants) if kind else []
    if obstacles:
        raise ConfigError("this run would fail after its training: " + "; ".join(obstacles))


def problems(kind: str, max_parameters: float, variants: tuple[str, ...]) -> list[str]:
    """What will fail later with a model of this `model_type`, each with its remedy."""
    obstacles = []
    if max_parameters < 1 and kind in supports.UNPRUNABLE:
        obstacles.append(supports.cannot_prune(kind))
    refused: dict[str, list[str]] = {}
    for variant in variants:
        if why := VARIANTS[variant].quantizer.module.obstacle(kind):
            refused.setdefault(why, []).append(variant)
    for why, names in refused.items():
        obstacles.append(
            f"{why}: take {', '.join(names)} out of quantize.variants, and its targets out of package.targets"
        )
    return obstacles
