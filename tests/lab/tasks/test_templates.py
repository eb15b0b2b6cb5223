from __future__ import annotations

import pytest

from flylora.errors import UserError
from flylora.lab.tasks.templates import Template


def _filled(text: str, **row: object) -> str:
    template = Template.parse("prompt", text)
    template.check(row)
    return template.render(row)


@pytest.mark.parametrize(
    ("text", "row", "filled"),
    [
        ("Q: {q}\nA:", {"q": "why?"}, "Q: why?\nA:"),
        ("{a}{b}{a}", {"a": 1, "b": 2.5}, "12.51"),
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ("{a}", {"a": "{b}"}, "{b}"),
        ("{a}", {"a": None}, ""),
        ("{a}", {"a": 0}, "0"),
        ("{a}", {"a": ["x", "é"]}, '["x", "é"]'),
        ("{Question text}, {a.b}", {"Question text": 1, "a.b": 2}, "1, 2"),
        ("plain", {}, "plain"),
    ],
)
def test_templates_are_filled_from_columns(text: str, row: dict[str, object], filled: str) -> None:
    assert _filled(text, **row) == filled


def test_an_unknown_field_is_refused_with_the_columns_that_exist() -> None:
    with pytest.raises(
        UserError, match=r"prompt template names the unknown field 'quest'.*columns are question, answer"
    ):
        _filled("{quest}", question="", answer="")


@pytest.mark.parametrize("text", ["{", "a } b", "{a", "{}", "{a:>8}", "{a!r}"])
def test_templates_that_are_not_plain_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="The prompt template"):
        Template.parse("prompt", text)


def test_values_cannot_be_reached_into() -> None:
    with pytest.raises(UserError, match=r"unknown field 'a\.__class__'"):
        _filled("{a.__class__}", a="x")
