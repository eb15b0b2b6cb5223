"""flylora: FlyLoRA adapters for PEFT.

Importing it registers ``FLYLORA`` with PEFT: ``get_peft_model``, ``PeftModel.from_pretrained`` and the rest then accept
[`FlyLoraConfig`] like any other config. The baselines of `flylora.lab.baselines` are registered with it.
"""

from __future__ import annotations

from flylora.errors import UserError
from flylora.lab import baselines as _baselines  # noqa: F401  registers them with PEFT
from flylora.tuner import FlyLoraConfig, FlyLoraLinear, FlyLoraModel
from flylora.tuner.balance import BalanceCallback, balance_model, expert_shares

__version__ = "0.1.0"

__all__ = [
    "BalanceCallback",
    "FlyLoraConfig",
    "FlyLoraLinear",
    "FlyLoraModel",
    "UserError",
    "__version__",
    "balance_model",
    "expert_shares",
]
