"""The server against its own OpenAPI description, by schemathesis: nothing that it sends is a
server error or goes undescribed."""

import sys

import pytest
from hypothesis import HealthCheck, settings
from serving import HELLO, app_of, served

from gptoss_jax.server.settings import ServerSettings

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

LIMITS = ServerSettings(date="2026-01-01", request_seconds=20, max_n=4)
APP, ENGINE = app_of(
    lambda request: [HELLO] * request.sampling.n, settings=LIMITS, adapters=["lora"], lenient=True
)
LONG = "--slow" in sys.argv  # every boundary of every parameter, and many more random requests
SCHEMA = schemathesis.openapi.from_dict(APP.openapi())
SCHEMA.config.phases.coverage.enabled = LONG


@pytest.fixture(scope="module")
def address():
    with served(APP) as address:
        yield address
    ENGINE.close(0)


def check(case, address):
    """All checks but one: parameters that exclude each other, token ids beyond the vocabulary and
    conversations without sense are refused, and a JSON schema has no words for that."""
    left_out = [checks.positive_data_acceptance]
    case.call_and_validate(base_url=address, excluded_checks=left_out)


@SCHEMA.parametrize()
@settings(
    max_examples=1000 if LONG else 15,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=list(HealthCheck),
)
def test_the_description_holds(case, address):
    check(case, address)


def test_every_operation_is_described():
    paths = APP.openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize"} <= set(paths)
    for path in paths.values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert "401" in operation["responses"] or "health" in operation["operationId"]
