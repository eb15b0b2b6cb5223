"""Text with named fields, ``{column}``, filled from the rows of a table."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flylora.errors import UserError


@dataclass(frozen=True)
class Template:
    """A parsed template: literal text, each piece followed by the field after it (``None`` at the end).

    Fields are names of columns and nothing else, so no attribute or method of a value is ever reached; braces that
    are meant as such are doubled, as in ``str.format``.
    """

    key: str
    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, key: str, text: str) -> Template:
        """The template ``text``, which errors call ``key``.

        Raises:
            UserError: A brace stands alone, or a field is not a plain name.
        """
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"The {key} template is not valid ({error}): write {{{{ or }}}} for a brace.") from error
        for _, field, spec, conversion in parsed:
            if field is not None and (not field or spec or conversion):
                raise UserError(
                    f"The {key} template has a field that is not the plain name of a column, "
                    f"'{{{field}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}': "
                    "put one name between the braces."
                )
        return cls(key, tuple((literal, field) for literal, field, _, _ in parsed))

    def check(self, columns: Iterable[str]) -> None:
        """Raises a ``UserError`` that names the first field which is not one of ``columns``."""
        known = list(columns)
        for _, field in self.pieces:
            if field is not None and field not in known:
                raise UserError(
                    f"The {self.key} template names the unknown field '{field}': the columns are {', '.join(known)}."
                )

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for one row; a missing value (null) becomes nothing."""
        return "".join(text + ("" if field is None else _written(row[field])) for text, field in self.pieces)


def _written(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
