"""Saved adapters and text for the tests of export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from flylora import FlyLoraConfig
from flylora.models import LoadedModel, load_model
from tiny_models import randomize

SaveAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def save_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> SaveAdapter:
    """Saves an adapter as if it had been trained, with the settings of ``FlyLoraConfig``."""

    def save(base: Path = tiny_model_dir, seed: int = 1, scale: float = 0.3, **changes: Any) -> Path:
        settings = {"r": 8, "k": 2, "balance_rate": 0.01, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        config = FlyLoraConfig(**{**settings, "task_type": "CAUSAL_LM", **changes})
        model = get_peft_model(load_model(str(base), "float32").model, config)
        folder = tmp_path_factory.mktemp("adapter")
        randomize(model, seed=seed, scale=scale).save_pretrained(str(folder), save_embedding_layers=False)
        return folder

    return save


@pytest.fixture(scope="session")
def routed(save_adapter: SaveAdapter) -> Path:
    """A routed adapter, r 8 and k 2."""
    return save_adapter()


@pytest.fixture(scope="session")
def linear(save_adapter: SaveAdapter) -> Path:
    """An adapter with k = r."""
    return save_adapter(k=8)


@pytest.fixture
def loaded(tiny_model_dir: Path) -> LoadedModel:
    return load_model(str(tiny_model_dir), "float32")


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty different lines of text."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words = ["the", "fly", "knows", "a", "sparse", "code", "for", "every", "smell", "it", "has", "met", "so", "far"]
    lines = [f"{i} " + " ".join(words[(i * 7 + j * (i + 1)) % len(words)] for j in range(3 + i % 9)) for i in range(40)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path
