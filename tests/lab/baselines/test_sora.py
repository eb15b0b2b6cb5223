"""SoRA against its reference, and the step that makes its gate sparse."""

from __future__ import annotations

import torch

from flylora.lab.baselines import gate_sparsity
from lab.baselines.small import adapted, array, assert_matches, layers, randomize, transformer
from reference import baselines as reference
from tiny_models import tokens


def test_output_and_gradients_equal_the_reference() -> None:
    model, layer = adapted("sora")
    x, grad = torch.randn(10, 12, requires_grad=True), torch.randn(10, 10)
    a, b, gate = (getattr(layer, f"sora_{name}")["default"] for name in ("A", "B", "gate"))
    base = layer.get_base_layer()
    wanted = reference.gated_ranks(array(x), array(base.weight), array(a), array(b), array(gate), 6 / 4, array(grad))
    out = model(x)
    out.backward(grad)
    assert_matches(wanted, base, out, x, {"A": a, "B": b, "gate": gate})


def test_after_each_step_the_gate_shrinks_by_the_learning_rate_times_l1() -> None:
    """Two groups with rates of their own; what the optimizer did is undone by asking a twin without penalty."""
    models = [randomize(transformer("sora", l1=l1)) for l1 in (0.5, 0.0)]
    for model in models:
        gates = [layer.sora_gate["default"] for layer in layers(model)]
        groups = [{"params": gates[:2], "lr": 0.1}, {"params": gates[2:], "lr": 0.4}]
        optimizer = torch.optim.SGD(groups)
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    for place, (shrunk, plain) in enumerate(zip(*map(layers, models), strict=True)):
        threshold = 0.5 * (0.1 if place < 2 else 0.4)
        wanted = reference.soft_threshold(plain.sora_gate["default"].tolist(), threshold)
        torch.testing.assert_close(shrunk.sora_gate["default"].tolist(), wanted, rtol=0, atol=1e-6)


def test_gates_become_exactly_zero_and_are_counted() -> None:
    model = randomize(transformer("sora", l1=1.0))
    assert gate_sparsity(model) == (0, 16)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.3)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    zero, total = gate_sparsity(model)
    assert 0 < zero < total == 16
    (layer, *_) = layers(model)
    left = int(layer.sora_gate["default"].count_nonzero())
    assert layer.active_parameters("default", 32, 24) == left * 57


def test_only_the_optimizer_that_trains_a_gate_moves_it() -> None:
    _, layer = adapted("sora")
    before = layer.sora_gate["default"].detach().clone()
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([other, layer.sora_gate["default"]], lr=0.3)
    other.sum().backward()
    optimizer.step()  # holds the gate, but no gradient reached it
    assert torch.equal(layer.sora_gate["default"], before)
