"""Adding adapters' updates to a base layer's weight, for every tuner layer of this package."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


def shifted_weight(layer: BaseTunerLayer, delta: Tensor) -> Tensor:
    """The base weight plus an update, summed in the update's dtype and kept in the weight's."""
    weight = layer.get_base_weight()
    return (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)


def merge_updates(layer: BaseTunerLayer, deltas: Mapping[str, Tensor], safe_merge: bool) -> None:
    """Add updates to the base weight and note whose they are; ``safe_merge`` checks for NaN and infinity first."""
    for name, delta in deltas.items():
        merged = shifted_weight(layer, delta)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights: the adapter {name} seems to be broken.")
        layer.set_base_weight(merged)
        layer.merged_adapters.append(name)
