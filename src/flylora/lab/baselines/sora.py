"""SoRA: LoRA with a gate that an l1 penalty makes sparse (Ding et al., EMNLP 2023, arXiv 2311.11696)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from flylora.errors import UserError
from flylora.lab.baselines.base import BaselineConfig, BaselineLinear, BaselineModel, Held, new_down


@dataclass
class SoraConfig(BaselineConfig):
    r"""Configuration of SoRA: ``out = W x + s * B (g * A x)`` with a gate g (r,).

    After each optimizer step of learning rate eta the gate takes the proximal step of the l1 penalty,
    ``g <- sign(g) max(|g| - eta * l1, 0)``, which makes entries exactly 0: their ranks are gone.

    Args:
        l1: weight of the penalty. Over a run the gate shrinks by l1 times the sum of the learning rates. The default
            gives the original's step, 3e-4, at its learning rate of 8e-4.
    """

    method: ClassVar[str] = "sora"

    l1: float = field(default=0.375, metadata={"help": "Weight of the l1 penalty on the gate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.l1, bool) or not isinstance(self.l1, (int, float)) or not 0 <= self.l1 < math.inf:
            raise UserError(f"l1 is {self.l1!r}, but must be a finite number >= 0.")


class SoraLinear(BaselineLinear):
    """SoRA adapters: A (r, n), B (m, r) and the gate (r,), all trained."""

    adapter_layer_names = ("sora_A", "sora_B", "sora_gate")
    stepped_name = "sora_gate"

    sora_A: nn.ParameterDict
    sora_B: nn.ParameterDict
    sora_gate: nn.ParameterDict

    def new_tensors(self, config: SoraConfig) -> dict[str, Tensor]:
        return {
            "sora_A": new_down(config.r, self.in_features),
            "sora_B": torch.zeros(self.out_features, config.r),
            "sora_gate": torch.randn(config.r),
        }

    def update(self, adapter: str, x: Tensor) -> Tensor:
        codes = self.dropouts[adapter](x) @ self.sora_A[adapter].t()
        return (codes * self.sora_gate[adapter]) @ (self.sora_B[adapter] * self.scaling[adapter]).t()

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.sora_B[adapter] * self.sora_gate[adapter], self.sora_A[adapter]

    @classmethod
    def after_step(cls, held: list[Held], optimizer: Optimizer) -> None:
        """The proximal step of each gate."""
        for layer, adapter, lr in held:
            gate = layer.sora_gate[adapter]
            gate.copy_(gate.sign() * (gate.abs() - lr * layer.configs[adapter].l1).clamp(min=0))

    def active_parameters(self, adapter: str, n: float, m: float) -> float:
        """Rows, columns and gates of the ranks whose gate is not 0; all of them where nothing is known yet (meta)."""
        gate = self.sora_gate[adapter]
        ranks = gate.numel() if gate.is_meta else int(gate.count_nonzero())
        return ranks * (n + m + 1)


def gate_sparsity(model: nn.Module, adapter: str = "default") -> tuple[int, int]:
    """(gates that are exactly 0, gates in all) over the model's SoRA layers."""
    layers = (module for module in model.modules() if isinstance(module, SoraLinear) and module.is_on(adapter))
    gates = [layer.sora_gate[adapter] for layer in layers]
    return sum(int((gate == 0).sum()) for gate in gates), sum(gate.numel() for gate in gates)


class SoraModel(BaselineModel):
    """Puts SoRA adapters into a model; see [`SoraConfig`]."""

    prefix = "sora_"
    tuner_layer_cls = SoraLinear
