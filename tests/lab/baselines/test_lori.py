"""LoRI against its reference, its two phases, and that a pause between them changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from flylora.lab.baselines import mask_adapter
from lab.baselines.small import adapted, array, assert_matches, layers, transformer
from reference import baselines as reference
from tiny_models import llama, tokens


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        ids = tokens(seed=step)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def test_output_and_gradients_equal_the_reference() -> None:
    model, layer = adapted("lori")
    x, grad = torch.randn(10, 12, requires_grad=True), torch.randn(10, 10)
    a, b, mask = (getattr(layer, f"lori_{name}")["default"] for name in ("A", "B", "mask"))
    base = layer.get_base_layer()
    wanted = reference.gated_ranks(
        array(x), array(base.weight), array(a), array(b) * array(mask), np.ones(4), 6 / 4, array(grad)
    )
    out = model(x)
    out.backward(grad)
    wanted.grads["B"] *= array(mask)
    assert_matches(wanted, base, out, x, {"B": b})
    assert a.grad is None
    assert not a.requires_grad


def test_a_stays_frozen_when_the_adapter_is_chosen_again() -> None:
    model = transformer("lori")
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "lori_B"
    }


def test_the_mask_keeps_the_largest_entries_of_all_layers_and_b_begins_again() -> None:
    model = transformer("lori", dense_steps=3)
    dense = copy.deepcopy(model)
    dense.peft_config["default"].dense_steps = None
    for twin in layers(dense):
        twin.configs["default"] = dense.peft_config["default"]
    train(dense, optimizer_of(dense), 3)
    optimizer = optimizer_of(model)
    train(model, optimizer, 3)
    masks = reference.largest_entries([array(layer.lori_B["default"]) for layer in layers(dense)], 0.25)
    for layer, mask in zip(layers(model), masks, strict=True):
        assert np.array_equal(array(layer.lori_mask["default"]), mask)
        assert not layer.lori_B["default"].any()
        assert layer.lori_B["default"] not in optimizer.state
        assert layer.active_parameters("default", layer.in_features, layer.out_features) == mask.sum()
    assert len({int(mask.sum()) / mask.size for mask in masks}) > 1  # one threshold for all, not one for each


def test_under_the_mask_only_kept_entries_train() -> None:
    model = transformer("lori", dense_steps=1)
    optimizer = optimizer_of(model)
    train(model, optimizer, 4)
    for layer in layers(model):
        up, mask = layer.lori_B["default"], layer.lori_mask["default"].bool()
        assert not up[~mask].any()
        assert int(layer.lori_steps["default"]) == 4
    kept = sum(int((layer.lori_B["default"] != 0).sum()) for layer in layers(model))
    total = sum(layer.lori_B["default"].numel() for layer in layers(model))
    assert kept == int(0.25 * total)


@pytest.mark.parametrize("pause", [1, 2, 3])
def test_a_run_that_was_saved_and_loaded_goes_on_as_if_it_had_not_been(pause: int, tmp_path: Path) -> None:
    whole = transformer("lori", dense_steps=2)
    start = copy.deepcopy(whole)
    train(whole, optimizer_of(whole), 4)
    optimizer = optimizer_of(start)
    train(start, optimizer, pause)
    start.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    later = optimizer_of(resumed)
    later.load_state_dict(optimizer.state_dict())
    train(resumed, later, 4 - pause, first=pause)
    for ours, theirs in zip(layers(resumed), layers(whole), strict=True):
        assert torch.equal(ours.lori_B["default"], theirs.lori_B["default"])
        assert torch.equal(ours.lori_mask["default"], theirs.lori_mask["default"])
        assert torch.equal(ours.lori_steps["default"], theirs.lori_steps["default"])


def test_without_dense_steps_nothing_is_masked_until_asked_for() -> None:
    model = transformer("lori", dense_steps=None)
    train(model, optimizer_of(model), 3)
    assert all(layer.lori_mask["default"].all() for layer in layers(model))
    before = [array(layer.lori_B["default"]) for layer in layers(model)]
    mask_adapter(model, 0.5)
    for layer, up, mask in zip(layers(model), before, reference.largest_entries(before, 0.5), strict=True):
        assert np.array_equal(array(layer.lori_B["default"]), up * mask)
