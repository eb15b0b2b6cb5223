"""Split-LoRA against its reference."""

from __future__ import annotations

import pytest
import torch

from flylora.lab.baselines import SplitLoraConfig
from lab.baselines.small import adapted, array, assert_matches
from reference import baselines as reference


@pytest.mark.parametrize(
    ("experts", "k", "groups"), [(1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 3, 1), (8, 8, 1), (8, 1, 2), (8, 2, 4), (4, 1, 4)]
)
def test_output_and_gradients_equal_the_reference(experts: int, k: int, groups: int) -> None:
    model, layer = adapted("splitlora", experts=experts, k=k, groups=groups)
    x, grad = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 10)
    a, b, router = (getattr(layer, f"splitlora_{name}")["default"] for name in ("A", "B", "router"))
    base = layer.get_base_layer()
    wanted = reference.split_lora(
        array(x).reshape(10, 12),
        array(base.weight),
        array(a),
        array(b),
        array(router),
        k,
        6 / 8,
        array(grad).reshape(10, 10),
        groups,
    )
    out = model(x)
    out.backward(grad)
    assert_matches(wanted, base, out, x, {"A": a, "B": b, "router": router})


def test_the_gate_weights_k_experts_and_no_others() -> None:
    _, layer = adapted("splitlora", experts=4, k=2)
    gate = layer.gate("default", torch.randn(50, 12))
    assert ((gate != 0).sum(dim=-1) == 2).all()
    assert ((gate >= 0) & (gate < 1)).all()
    assert (gate != 0).any(dim=0).all()  # and which ones differs


@pytest.mark.parametrize(
    ("experts", "groups", "k"), [(1, 1, 1), (4, 1, 1), (8, 1, 2), (16, 1, 4), (32, 1, 8), (32, 2, 4)]
)
def test_a_quarter_of_the_ranks_acts_unless_told_otherwise(experts: int, groups: int, k: int) -> None:
    assert SplitLoraConfig(r=32, experts=experts, groups=groups).active_in_group == k
