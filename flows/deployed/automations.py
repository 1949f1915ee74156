"""What Prefect's server does by itself: the automations that infra/automations.yaml names."""

from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore

from flows.workspace.paths import Workspace

FILE = Path("infra") / "automations.yaml"


def apply(root: Workspace) -> list[str]:
    """Bring the server's automations in step with the file; returns their names. None where it is missing.

    What is there already is left alone: an update would forget which runs have been heard of.
    """
    if not (root / FILE).is_file():
        return []
    wanted = [AutomationCore.model_validate(each) for each in yaml.safe_load((root / FILE).read_bytes())["automations"]]
    with get_client(sync_client=True) as client:
        for each in wanted:
            known = client.read_automations_by_name(each.name)
            if not known:
                client.create_automation(each)
            elif _said(known[0]) != _said(each):
                client.update_automation(known[0].id, each)
    return [each.name for each in wanted]


def _said(automation: AutomationCore) -> dict[str, Any]:
    """Its fields without the ids that the server gives."""
    fields: dict[str, Any] = automation.model_dump(exclude={"id"})
    fields["trigger"].pop("id", None)
    return fields
