"""What all layers of one model share during a forward pass: which tokens are padding."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


class RoutingContext:
    """Which tokens are padding, and how the model's loss was scaled (None: 1)."""

    def __init__(self) -> None:
        self.token_mask: Tensor | None = None
        self.loss_scale: Tensor | None = None

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask of x's tokens, flattened to (N,), or None where it does not describe them."""
        mask = self.token_mask
        if mask is None or mask.shape != x.shape[:-1]:
            return None
        return mask.reshape(-1)


class PaddingMaskHook:
    """Before each forward of the model: tells its layers which tokens the attention mask calls padding."""

    def __init__(self, context: RoutingContext) -> None:
        self.context = context
        self._positions: dict[type, int] = {}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            position = self._position(model)
            mask = args[position] if 0 <= position < len(args) else None
        self.context.token_mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _position(self, model: nn.Module) -> int:
        if type(model) not in self._positions:
            names = list(inspect.signature(type(model).forward).parameters)[1:]
            self._positions[type(model)] = names.index("attention_mask") if "attention_mask" in names else -1
        return self._positions[type(model)]
