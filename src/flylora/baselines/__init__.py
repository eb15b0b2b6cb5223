"""Methods that FlyLoRA is compared with and PEFT lacks, as PEFT methods; importing this package registers them."""

from __future__ import annotations

from ..tuner.registration import register
from .drop_lora import DropLoraConfig, DropLoraModel
from .hydra_lora import HydraLoraConfig, HydraLoraModel
from .lori import LoriConfig, LoriModel, mask_adapter
from .sora import SoraConfig, SoraModel, gate_sparsity
from .split_lora import SplitLoraConfig, SplitLoraModel

__all__ = [
    "DropLoraConfig",
    "DropLoraModel",
    "HydraLoraConfig",
    "HydraLoraModel",
    "LoriConfig",
    "LoriModel",
    "SoraConfig",
    "SoraModel",
    "SplitLoraConfig",
    "SplitLoraModel",
    "gate_sparsity",
    "mask_adapter",
]

_METHODS = (
    (DropLoraConfig, DropLoraModel),
    (HydraLoraConfig, HydraLoraModel),
    (LoriConfig, LoriModel),
    (SoraConfig, SoraModel),
    (SplitLoraConfig, SplitLoraModel),
)
for _config, _model in _METHODS:
    register(_config, _model, _config.method)
