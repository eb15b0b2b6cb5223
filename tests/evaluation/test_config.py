"""What an evaluation config accepts."""

from __future__ import annotations

import pytest

from flylora.errors import UserError
from flylora.evaluation import EvalConfig


@pytest.mark.parametrize("name", ["limit", "batch_size", "max_new_tokens"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1, not 0"):
        EvalConfig(model="m", task="t", **{name: 0})  # type: ignore[arg-type]
    assert getattr(EvalConfig(model="m", task="t", **{name: 1}), name) == 1  # type: ignore[arg-type]
