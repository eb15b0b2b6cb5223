"""FlyLoRA as a PEFT method; importing this package registers it."""

from __future__ import annotations

from .config import FlyLoraConfig
from .layer import FlyLoraLinear
from .model import FlyLoraModel
from .registration import register

__all__ = ["FlyLoraConfig", "FlyLoraLinear", "FlyLoraModel"]

register(FlyLoraConfig, FlyLoraModel)
