"""The table of merge methods."""

from __future__ import annotations

import re

from flylora.merging import MergeOptions
from flylora.merging.table import METHODS


def test_the_help_of_weights_names_every_method_that_adds() -> None:
    said = re.search(r"except for (.*?), which add\.", " ".join(str(MergeOptions.__doc__).split()))
    assert said is not None
    assert set(re.split(r", | and ", said[1])) == {name for name, row in METHODS.items() if not row.normalises}


def test_weights_that_add_are_used_as_they_are_however_large() -> None:
    assert METHODS["sum"].effective_weights([1e12, -1e12, 1.0], 3) == [1e12, -1e12, 1.0]
    assert METHODS["average"].effective_weights([3.0, -1.0], 2) == [1.5, -0.5]
