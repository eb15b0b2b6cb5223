"""The baselines on quantized bases, on the CPU: the base's own output plus the update, trained, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from lab.baselines.small import CONFIGS, adapted
from tiny_models import seeded

bnb = pytest.importorskip("bitsandbytes")

N, M = 64, 32


def plain() -> nn.Linear:
    return seeded(lambda: nn.Linear(N, M))


def four_bit() -> nn.Module:
    layer = bnb.nn.Linear4bit(N, M, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu")


def eight_bit() -> nn.Module:
    layer = bnb.nn.Linear8bitLt(N, M, has_fp16_weights=False)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("make", [four_bit, eight_bit])
@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_the_update_is_added_to_what_the_quantized_layer_gives(
    method: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model, layer = adapted(method, make())
    full, full_layer = adapted(method, plain())
    x = torch.randn(9, N, requires_grad=True)
    update = full(x) - full_layer.get_base_layer()(x)
    out = model(x)
    torch.testing.assert_close(out, layer.get_base_layer()(x) + update, rtol=1e-3, atol=1e-4)
    out.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(layer.adapter_layer_names) - len(layer.frozen_names)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(nn.Sequential(make()), tmp_path).eval()
    assert torch.equal(loaded(x), out)
