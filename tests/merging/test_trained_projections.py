"""Merging adapters whose projections were trained (Tables 3 and 15): each input keeps its own."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from conftest import make_model
from flylora import FlyLoraConfig
from flylora.merging import merge
from saved_adapters import assert_same_outputs, fly, outputs, randomise, weighted

TRAINING = {"trained": {}, "two_phase": {"projection_steps": 3}}


def saved(path: Path, seed: int, **fields: object) -> Path:
    model = peft.get_peft_model(make_model(), fly(**fields))
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "flylora_trained_A" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(path), save_embedding_layers=False)
    return path


@pytest.mark.parametrize("training", TRAINING)
def test_the_average_is_the_mean_of_the_outputs_though_the_seeds_are_equal(training: str, tmp_path: Path) -> None:
    fields = {"projection_training": training, **TRAINING[training]}
    paths = [saved(tmp_path / str(seed), seed, **fields) for seed in (1, 2)]
    merge(paths, tmp_path / "out")
    assert_same_outputs(outputs(tmp_path / "out"), weighted([outputs(path) for path in paths], [0.5, 0.5]))
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert isinstance(config, FlyLoraConfig)
    assert (config.projection_training, config.save_projection) == ("frozen", True)


def test_one_alone_and_one_beside_a_frozen_one(tmp_path: Path) -> None:
    trained, frozen = saved(tmp_path / "a", 1, projection_training="trained"), saved(tmp_path / "b", 2)
    for number, paths in enumerate(([trained], [trained, frozen])):
        out = tmp_path / f"out{number}"
        merge(paths, out)
        expected = weighted([outputs(path) for path in paths], [1 / len(paths)] * len(paths))
        assert_same_outputs(outputs(out), expected)
