"""What `flylora inspect` says of an adapter, and that it notices an altered one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.tiny_models import llama

from flylora import FlyLoraConfig, UserError, expert_shares
from flylora.inspection import EXPERT_LOAD_FILE, inspect
from flylora.lab.show import inspection_tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trained adapter on q_proj (32 x 32) and down_proj (32 x 40) of two layers, with its expert loads."""
    config = FlyLoraConfig(r=8, k=2, target_modules=["q_proj", "down_proj"], projection_seed=3, balance_rate=1e-2)
    model = get_peft_model(llama(), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        ids = torch.arange(20).view(2, 10) + step
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    (tmp_path / EXPERT_LOAD_FILE).write_text(json.dumps(expert_shares(model)))
    return tmp_path


def shown(path: Path, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(inspection_tables(inspect(path)))
    return console.export_text()


def test_counts_seeds_shapes_and_loads(folder: Path) -> None:
    summary = inspect(folder)
    assert (summary.kind, len(summary.modules), summary.intact) == ("flylora", 4, True)
    assert summary.trainable == 4 * 32 * 8
    assert summary.active == 4 * 32 * 2
    assert summary.file_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert summary.settings["projection_seed"] == 3
    assert {module.shape for module in summary.modules} == {(32, 32), (32, 40)}
    for module in summary.modules:
        assert (module.r, module.k, module.fingerprint_ok) == (8, 2, True)
        assert -2 <= module.bias_steps[0] <= module.bias_steps[1] <= 2
        assert module.load is not None
        least, mean, most, variation = module.load
        assert 0 <= least <= mean <= most <= 1
        assert mean == pytest.approx(2 / 8)
        assert variation >= 0
    text = shown(folder)
    assert "1,024 trained, 256 active on a token, 4 modules" in text
    assert "every projection is the one it was trained with" in text
    assert "4 modules of model.layers" in text
    assert "1.mlp.down_proj" in text


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_nothing(folder: Path, width: int) -> None:
    text = shown(folder, width)
    assert "…" not in text
    assert str(folder) in "".join(line[14:].rstrip() for line in text.splitlines())
    for module in inspect(folder).modules:
        assert module.load is not None
        assert " ".join(f"{value:.2f}" for value in module.load) in text


def test_an_altered_seed_is_a_mismatch_and_not_a_crash(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.flylora_seed"))
    tensors[key] += 1
    save_file(tensors, file)
    summary = inspect(folder)
    assert summary.intact is False
    assert [m.fingerprint_ok for m in summary.modules].count(False) == 1
    assert "MISMATCH" in shown(folder)


def test_an_adapter_that_does_not_state_its_sizes_cannot_be_checked(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_features": None}))
    summary = inspect(folder)
    assert summary.intact is None
    assert {module.shape for module in summary.modules} == {(32, None)}
    assert "some could not be checked" in shown(folder)


def test_without_recorded_loads_none_are_shown(folder: Path) -> None:
    (folder / EXPERT_LOAD_FILE).unlink()
    assert all(module.load is None for module in inspect(folder).modules)
    (folder / EXPERT_LOAD_FILE).write_text("[1")
    with pytest.raises(UserError, match=EXPERT_LOAD_FILE):
        inspect(folder)


def test_a_plain_lora_counts_both_factors(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    summary = inspect(tmp_path)
    assert (summary.kind, summary.trainable, summary.active) == ("lora", 2 * 4 * 64, 2 * 4 * 64)
    assert "lora" in shown(tmp_path)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter_config"):
        inspect(tmp_path)
