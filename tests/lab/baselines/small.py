"""Small adapted layers and models for the baselines' tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from flylora.lab.baselines import DropLoraConfig, HydraLoraConfig, LoriConfig, SoraConfig, SplitLoraConfig
from flylora.lab.baselines.base import BaselineConfig, BaselineLinear
from reference import baselines as reference
from tiny_models import llama, seeded

CONFIGS: dict[str, tuple[type[BaselineConfig], dict[str, Any]]] = {
    "droplora": (DropLoraConfig, {"r": 4, "rank_dropout": 0.5}),
    "hydralora": (HydraLoraConfig, {"r": 3, "experts": 3}),
    "lori": (LoriConfig, {"r": 4, "density": 0.25, "dense_steps": 2}),
    "sora": (SoraConfig, {"r": 4, "l1": 0.5}),
    "splitlora": (SplitLoraConfig, {"r": 8, "experts": 4, "k": 2}),
}


def config(method: str, **changes: Any) -> BaselineConfig:
    cls, options = CONFIGS[method]
    return cls(**{**options, "target_modules": ["q_proj", "v_proj"], "alpha": 6, **changes})


def layers(model: nn.Module) -> list[BaselineLinear]:
    return [module for module in model.modules() if isinstance(module, BaselineLinear)]


def randomize(model: nn.Module, adapter: str = "default", seed: int = 1) -> nn.Module:
    """As if trained: no parameter is at its start, and a mask has holes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        for name in layer.adapter_layer_names:
            parameter = getattr(layer, name)[adapter]
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if "lori_mask" in layer.buffer_names:
            mask = layer.lori_mask[adapter]
            mask.copy_(torch.randint(0, 2, mask.shape, generator=generator))
            layer.lori_steps[adapter].fill_(7)
    return model


def adapted(method: str, base: nn.Module | None = None, **changes: Any) -> tuple[nn.Module, BaselineLinear]:
    """A model of one layer with a trained-looking adapter, in evaluation, and that layer."""
    base = seeded(lambda: nn.Linear(12, 10)) if base is None else base
    model = randomize(get_peft_model(nn.Sequential(base), config(method, target_modules=["0"], **changes)))
    return model.eval(), layers(model)[0]


def transformer(method: str, **changes: Any) -> PeftModel:
    return get_peft_model(llama(), config(method, **changes))


def array(tensor: Tensor) -> reference.Array:
    return np.array(tensor.detach().double())


def assert_matches(
    wanted: reference.Result, base: nn.Linear, out: Tensor, x: Tensor, trained: dict[str, Tensor]
) -> None:
    """Output, gradient to x and gradients of the trained tensors are the reference's, which leaves the bias out."""
    found = {"output": out.detach() - base.bias.detach(), "x": x.grad, **{k: p.grad for k, p in trained.items()}}
    expected = {"output": np.array(wanted.output), "x": np.array(wanted.grad_x), **wanted.grads}
    for name, tensor in found.items():
        assert tensor is not None
        value = torch.tensor(expected[name]).reshape(tensor.shape)
        torch.testing.assert_close(
            tensor.double(), value, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
