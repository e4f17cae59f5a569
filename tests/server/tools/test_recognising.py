"""A chat template tells how its model calls."""

from __future__ import annotations

import pytest
from tests.server.tools.writers import BY_NAME, FOR_TOOLS, TEMPLATES

from spanwise.embedded import EMBEDDED
from spanwise.server.tools.formats import tool_format


def test_a_template_of_every_format_is_known() -> None:
    assert {name: getattr(tool_format(text), "name", None) for name, text in TEMPLATES.items()} == {
        name: name for name in BY_NAME
    }


def test_a_template_that_shows_no_tools_has_no_format() -> None:
    for text in TEMPLATES.values():
        assert (
            tool_format(text.replace(FOR_TOOLS, "{{ '# tools' }} tools {{ message.tools }}"))
            is None
        )


@pytest.mark.parametrize("model", sorted(EMBEDDED))
def test_the_embedded_models_call_no_tools(model: str) -> None:
    assert tool_format((EMBEDDED[model] / "chat_template.jinja").read_text()) is None


@pytest.mark.parametrize("text", ["", FOR_TOOLS, f"{FOR_TOOLS}<tool_calls>", "{% if tools"])
def test_an_unknown_template_has_no_format(text: str) -> None:
    assert tool_format(text) is None
