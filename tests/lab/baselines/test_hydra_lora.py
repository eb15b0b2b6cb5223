"""HydraLoRA against its reference."""

from __future__ import annotations

import pytest
import torch

from lab.baselines.small import adapted, array, assert_matches
from reference import baselines as reference


@pytest.mark.parametrize("experts", [1, 3])
def test_output_and_gradients_equal_the_reference(experts: int) -> None:
    model, layer = adapted("hydralora", experts=experts)
    x, grad = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 10)
    a, b, router = (getattr(layer, f"hydralora_{name}")["default"] for name in ("A", "B", "router"))
    base = layer.get_base_layer()
    wanted = reference.hydra_lora(
        array(x).reshape(10, 12),
        array(base.weight),
        array(a),
        array(b),
        array(router),
        6 / 3,
        array(grad).reshape(10, 10),
    )
    out = model(x)
    out.backward(grad)
    assert_matches(wanted, base, out, x, {"A": a, "B": b, "router": router})


def test_dropout_leaves_the_router_alone() -> None:
    model, layer = adapted("hydralora", dropout=0.5)
    x = torch.randn(6, 12)
    torch.manual_seed(0)
    out = model.train()(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    weights = (x @ layer.hydralora_router["default"].t()).softmax(dim=-1)
    y = dropped @ layer.hydralora_A["default"].t()
    update = torch.einsum("te,emr,tr->tm", weights, layer.hydralora_B["default"], y) * 2
    torch.testing.assert_close(out, layer.get_base_layer()(x) + update)
