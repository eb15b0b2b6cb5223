"""Methods that FlyLoRA is compared with and PEFT lacks, as PEFT methods; importing this package registers them."""

from __future__ import annotations

from flylora.lab.baselines.drop_lora import DropLoraConfig, DropLoraModel
from flylora.lab.baselines.hydra_lora import HydraLoraConfig, HydraLoraModel
from flylora.lab.baselines.lori import LoriConfig, LoriModel, mask_adapter
from flylora.lab.baselines.sora import SoraConfig, SoraModel, gate_sparsity
from flylora.lab.baselines.split_lora import SplitLoraConfig, SplitLoraModel
from flylora.tuner.peft_compat import register

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
