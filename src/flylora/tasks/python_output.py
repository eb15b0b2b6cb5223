"""Short word problems with worked answers."""

from __future__ import annotations

from flylora.tasks.base import Example, Split, Task

_SUMS = {"train": range(0, 20), "validation": range(20, 25), "test": range(25, 30)}


def build(split: Split) -> list[Example]:
    """Every problem of one split."""
    return [
        Example(
            f"add-{a}-{b}",
            f"Tom has {a} apples and gets {b}. How many now?\n",
            f"{a} + {b} = {a + b}",
            str(a + b),
        )
        for a in _SUMS[split]
        for b in range(2, 12)
    ]


TASK = Task(
    name="python_output",
    version="0",
    load=build,
    kind="generate",
    extractor="last_number",
    metric="exact_match",
    max_length=96,
    max_new_tokens=24,
    stop=("\n",),
    licence="Apache-2.0",
)
