"""What a person sees on Prefect's pages: help beside each field, errors as sentences. The rest is in test_pipeline.py."""

import logging

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema

from flows.deployed import deployments
from flows.run import artifacts
from tasks.errors import ConfigError


@pytest.mark.parametrize("flow", [deployments.train_and_release, deployments.rollback], ids=lambda flow: flow.name)
def test_every_field_of_a_form_is_explained(flow: Flow) -> None:
    """Prefect shows what the docstring says of a parameter, and drops what its annotation says."""
    fields = parameter_schema(flow.fn).properties
    assert {name for name, field in fields.items() if not field.get("description")} == set()


def told(error: Exception, caplog: pytest.LogCaptureFixture) -> str:
    artifacts.plain_errors()
    with caplog.at_level(logging.ERROR):
        try:
            raise error
        except type(error) as raised:
            logging.getLogger("prefect.flow_runs").exception("Encountered exception during execution: %r", raised)
    return caplog.text


def test_an_error_of_ours_is_told_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("prefect.flow_runs").addHandler(caplog.handler)
    text = told(ConfigError("the disk is full"), caplog)
    assert "ConfigError('the disk is full')" in text
    assert "Traceback" not in text


def test_a_bug_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("prefect.flow_runs").addHandler(caplog.handler)
    assert "Traceback" in told(KeyError("bug"), caplog)
