"""The OpenAPI document: complete, and made of the types that check the bodies."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.routing import APIRoute

from asgi_client import client_of
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app
from sagellm_gateway.documents import description_of
from sagellm_gateway.keys import new_key
from sagellm_gateway.routes import ROUTERS
from sagellm_gateway.settings import GatewaySettings

ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]


def document(**sections: Any) -> dict[str, Any]:
    return create_app(ControlPlaneManager(), settings=GatewaySettings.model_validate(sections)).openapi()


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.methods} {route.path}")
def test_every_route_says_what_it_takes_and_answers(route: APIRoute) -> None:
    if route.include_in_schema:
        description = description_of(route.endpoint)
        assert description is not None, f"put @described(...) beside {route.path}"
        assert route.endpoint.__doc__


def test_bodies_and_answers_are_those_of_the_types() -> None:
    chat = document()["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    answers = chat["responses"]
    assert set(answers) == {"200", "400", "401", "403", "404", "408", "413", "429", "503", "504"}
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    assert answers["404"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}


def test_types_have_plain_names_of_their_own() -> None:
    # Generators of clients make a class of each; two that are called alike are left out, with all that refers to them.
    schemas = document()["components"]["schemas"]
    assert [name for name in schemas if not name.isalnum()] == []
    assert {name: schema.get("title", name) for name, schema in schemas.items()} == {name: name for name in schemas}
    assert {"ToolCallInput", "OllamaToolCall", "AnthropicMessage", "ResponsesToolChoiceFunction"} <= set(schemas)


def test_every_reference_leads_somewhere() -> None:
    whole = document()
    names = set(whole["components"]["schemas"])

    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    found = references(whole)
    assert found
    assert {reference.removeprefix("#/components/schemas/") for reference in found} <= names
    assert not {"HTTPValidationError", "ValidationError"} & names
    assert "422" not in str(whole["paths"])


def test_keys_are_asked_for_only_where_there_are_some() -> None:
    assert "security" not in document()
    with_keys = document(auth={"keys": [new_key("ada")[1]]})
    assert with_keys["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert set(with_keys["components"]["securitySchemes"]) == {"bearer", "x-api-key"}


async def test_a_wrong_method_is_told_all_right_ones() -> None:
    manager = ControlPlaneManager()
    manager.register_engine(FakeEngine(), engine_id="fake", model="m")
    async with client_of(create_app(manager)) as client:
        for path, methods in (("/sessions/x", "DELETE, GET, HEAD, PATCH"), ("/v1/chat/completions", "POST")):
            answer = await client.put(path)
            assert (answer.status_code, answer.headers["allow"]) == (405, methods)
            assert answer.json()["error"]["message"].startswith(f"{path} takes {methods}, not PUT")
