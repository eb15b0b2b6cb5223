"""DropLoRA against its reference: which ranks it drops, and that evaluation drops none."""

from __future__ import annotations

import numpy as np
import torch

from lab.baselines.small import adapted, array, assert_matches, layers, randomize, transformer
from reference import baselines as reference
from tiny_models import tokens


def drawn_mask(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.nn.functional.dropout(torch.ones(4), 0.5)


def test_output_and_gradients_equal_the_reference_in_training_and_in_evaluation() -> None:
    masks = {True: drawn_mask(3), False: torch.ones(4)}
    assert 0 < int((masks[True] == 0).sum()) < 4
    for training, mask in masks.items():
        model, layer = adapted("droplora")
        x, grad = torch.randn(10, 12, requires_grad=True), torch.randn(10, 10)
        a, b = layer.droplora_A["default"], layer.droplora_B["default"]
        base = layer.get_base_layer()
        wanted = reference.gated_ranks(
            array(x), array(base.weight), array(a), array(b), array(mask), 6 / 4, array(grad)
        )
        torch.manual_seed(3)
        out = model.train(training)(x)
        out.backward(grad)
        assert_matches(wanted, base, out, x, {"A": a, "B": b})


def test_all_tokens_of_a_pass_lose_the_same_ranks_and_the_next_pass_others() -> None:
    model, layer = adapted("droplora", r=8)
    model.train()
    x = torch.randn(30, 12)
    torch.manual_seed(0)
    lost = []
    for _ in range(20):
        layer.droplora_B["default"].grad = None
        model(x).square().sum().backward()
        columns = layer.droplora_B["default"].grad.abs().sum(dim=0) == 0
        lost.append(tuple(columns.tolist()))
    assert len(set(lost)) > 10
    share = np.mean(lost)
    assert 0.3 < share < 0.7


def test_a_checkpointed_layer_is_recomputed_with_the_same_ranks() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = randomize(transformer("droplora"))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([layer.droplora_B["default"].grad for layer in layers(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
