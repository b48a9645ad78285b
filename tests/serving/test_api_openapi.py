"""The published description against the app itself: no 5xx, and answers as it says."""

import itertools

import pytest
import schemathesis
from api_server import INFO, FakeEngines
from hypothesis import HealthCheck, Phase, given, settings

from vfengine.serving.app import AppOptions, create_app
from vfengine.serving.gate import GateOptions
from vfengine.serving.openapi import openapi
from vfengine.serving.request_forms import Bounds
from vfengine.serving.store import Store

CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_headers_conformance,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.unsupported_method,
    schemathesis.checks.negative_data_rejection,
    schemathesis.checks.allow_header_conformance,
]
DOCUMENT = openapi(INFO, Bounds(), with_keys=False)
METHODS = ("get", "post", "delete")
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
OPERATIONS = [
    (path, method, mode)
    for path, item in DOCUMENT["paths"].items()
    for method in METHODS
    for mode in (POSITIVE, NEGATIVE)
    if method in item and (mode is POSITIVE or path.startswith("/v1/videos"))
]  # other paths have nothing that could be wrong


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("openapi") / "store", durable=False)


@pytest.fixture(scope="module")
def schema(store):
    """The description that an app with a few videos publishes."""
    engines = FakeEngines(store, INFO)
    app = create_app(store, INFO, engines, AppOptions(GateOptions(any_host=True), max_queue=50))
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    engines.stop()


def test_the_description_is_published(schema):
    assert schema.raw_schema == DOCUMENT


@pytest.mark.parametrize("path, method, mode", OPERATIONS)
def test_answers_are_as_described(schema, store, path, method, mode):
    """Requests that the description allows, and others; ids of videos take turns with others."""
    turns = itertools.count()

    @settings(
        max_examples=25,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def answer(case):
        ids = [job.id for job in store.list(limit=3)[0]]
        turn = next(turns)
        if ids and "video_id" in case.path_parameters and turn % 2:
            case.path_parameters["video_id"] = ids[turn // 2 % len(ids)]
        case.call_and_validate(checks=CHECKS)

    answer()
