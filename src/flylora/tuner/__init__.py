"""FlyLoRA as a PEFT method; importing this package registers it with PEFT."""

from __future__ import annotations

from flylora.tuner.config import FlyLoraConfig
from flylora.tuner.layer import FlyLoraLinear
from flylora.tuner.model import FlyLoraModel
from flylora.tuner.peft_compat import register

__all__ = ["FlyLoraConfig", "FlyLoraLinear", "FlyLoraModel"]

register(FlyLoraConfig, FlyLoraModel)
