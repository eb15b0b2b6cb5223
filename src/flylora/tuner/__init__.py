"""FlyLoRA as a PEFT method; importing this package registers it, and the baselines with it."""

from __future__ import annotations

from .config import FlyLoraConfig
from .layer import FlyLoraLinear
from .model import FlyLoraModel
from .registration import register

__all__ = ["FlyLoraConfig", "FlyLoraLinear", "FlyLoraModel"]

register(FlyLoraConfig, FlyLoraModel)

# Whoever can load a FlyLoRA adapter can load a baseline's; they import parts of this package, so they come last.
from .. import baselines  # noqa: E402, F401
