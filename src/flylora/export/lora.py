"""Writing an export as a stock PEFT LoRA folder, which needs nothing of flylora to be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from flylora.activations import base_layer, modules_by_name
from flylora.adapter_folder import KEY_PREFIX, WEIGHTS_FILE, SavedAdapter, TensorFile, save_config
from flylora.export.factors import LinearFactors
from flylora.projection import canonical_name


def write_lora(folder: Path, adapter: SavedAdapter, factors: Sequence[LinearFactors], model: nn.Module) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    All modules have one rank r, smaller ones filled up with zeros, and lora_alpha = r, so that the scaling is 1
    everywhere: readers other than PEFT often know neither rank nor alpha patterns.

    Args:
        folder: an existing folder. adapter: what is exported.
        factors: of every module. model: the base model, which tells the names and kinds of its layers.
    """
    rank = max(found.up.shape[1] for found in factors)
    layout = {}
    for found in factors:
        layout[f"{KEY_PREFIX}{found.name}.lora_A.weight"] = (torch.float32, (rank, int(found.down.shape[1])))
        layout[f"{KEY_PREFIX}{found.name}.lora_B.weight"] = (torch.float32, (int(found.up.shape[0]), rank))
    save_config(lora_config(adapter, rank, model), folder)
    with TensorFile(folder / WEIGHTS_FILE, layout) as file:
        for found in factors:
            missing = rank - found.up.shape[1]
            file.write(f"{KEY_PREFIX}{found.name}.lora_A.weight", pad(found.down, (0, 0, 0, missing)))
            file.write(f"{KEY_PREFIX}{found.name}.lora_B.weight", pad(found.up, (0, missing)))


def lora_config(adapter: SavedAdapter, rank: int, model: nn.Module) -> LoraConfig:
    """The config of the exported LoRA: the adapter's base model and task type, its modules, scaling 1."""
    modules = modules_by_name(model, adapter.modules)
    kinds = {isinstance(base_layer(module), Conv1D) for module in modules.values()}
    return LoraConfig(
        base_model_name_or_path=adapter.base_model,
        revision=adapter.config.revision,
        task_type=adapter.config.task_type,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=target_names(adapter.modules, model),
        fan_in_fan_out=kinds == {True},
    )


def target_names(adapted: Sequence[str], model: nn.Module) -> list[str]:
    """The last parts of the modules' names where these say which ones are adapted, else the full names."""
    last = {name.rpartition(".")[2] for name in adapted}
    named = {canonical_name(name) for name, _ in model.named_modules()}
    alike = {name for name in named if name.rpartition(".")[2] in last}
    return sorted(last if alike == set(adapted) else adapted)
