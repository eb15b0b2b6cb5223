"""Something to do after every optimizer step, without the user calling anything.

PyTorch's public optimizer-step hooks see every optimizer; what a layer does after a step (balance its load, count
steps, shrink its gates) is registered here once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_nested: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_callbacks: list[Callable[[Optimizer], None]] = []


def after_optimizer_steps(callback: Callable[[Optimizer], None]) -> None:
    """Call ``callback`` with the optimizer after each step that was taken; asking twice changes nothing.

    An optimizer that another one steps is left out: the outer one stands for both.
    """
    if callback in _callbacks:
        return
    if not _callbacks:
        register_optimizer_step_pre_hook(_before_optimizer_step)
        register_optimizer_step_post_hook(_after_optimizer_step)
    _callbacks.append(callback)


def positions(optimizer: Optimizer) -> dict[int, int]:
    """The place of each parameter, by its id, among those that the optimizer holds.

    Every rank of a data-parallel run sees the same order, which a set of live layers would not have.
    """
    parameters = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    return {parameter: i for i, parameter in enumerate(parameters)}


def _before_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # An optimizer may step another. ZeroRedundancyOptimizer's holds only this rank's share of the parameters, and
    # summing over ranks that step different layers would mix their loads: the outer optimizer's step is the one.
    _nested.update(inner for inner in vars(optimizer).values() if isinstance(inner, Optimizer))


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _nested:
        return
    _nested.difference_update(inner for inner in vars(optimizer).values() if isinstance(inner, Optimizer))
    overflow = getattr(optimizer, "found_inf", None)
    if overflow is not None and bool(overflow):
        return  # fused optimizers skip the step themselves when gradient scaling overflowed
    for callback in _callbacks:
        callback(optimizer)
