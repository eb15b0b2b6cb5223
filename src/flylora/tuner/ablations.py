"""FlyLoRA's ablations (Tables 3, 13 and 15): an auxiliary balancing loss, other projections, projections that train.

The default method uses nothing of this. Symbols as in `flylora.functional`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from flylora import functional
from flylora.functional import Block
from flylora.tuner.optimizer_steps import after_optimizer_steps, positions

if TYPE_CHECKING:
    from flylora.tuner.config import FlyLoraConfig
    from flylora.tuner.layer import FlyLoraLinear, RoutingContext


class Ablation(NamedTuple):
    """What one adapter does differently from the default.

    Attributes:
        aux_coefficient: weight of the auxiliary balancing loss; None: there is none.
        trained: whether A trains, for ``trained_steps`` optimizer steps or, None, throughout.
    """

    aux_coefficient: float | None
    trained: bool
    trained_steps: int | None


def ablation_of(config: FlyLoraConfig) -> Ablation | None:
    """The ablation a config asks for, None for the default."""
    coefficient = config.balance_coefficient if config.balance == "aux_loss" else None
    trained = config.projection_training != "frozen"
    return Ablation(coefficient, trained, config.projection_steps) if trained or coefficient is not None else None


# --- the auxiliary balancing loss (Table 13) --------------------------------------------------------------------------


def balance_loss(y: Tensor, routing_bias: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """r * sum over i of f_i P_i (Fedus et al., 2022), averaged over routed blocks: 1 for perfect balance.

    f_i is rank i's share of all choices, P_i the mean over tokens of softmax(scores)_i; the gradient goes through P.

    Args:
        y: (N, sum of r). routing_bias: (sum of r,).
    """
    ranks = [block.r for block in blocks]
    losses = []
    for part, bias, block in zip(y.split(ranks, dim=1), routing_bias.split(ranks), blocks, strict=True):
        if block.is_linear:
            continue
        scores = functional.scores(part, bias, block.selection, block.noise_seed)
        chosen = functional.select(part.detach(), bias, (block,))
        load = torch.zeros(block.r, dtype=torch.int64, device=y.device)
        functional.add_expert_load(load, chosen)
        shares = load.to(y.dtype) / max(1, chosen.numel())
        losses.append(block.r * (shares * scores.softmax(dim=1).mean(dim=0)).sum())
    return torch.stack(losses).mean() if losses else y.sum() * 0


class _CarryLoss(torch.autograd.Function):
    """x itself, with a loss on its back: backward gives the loss the gradient that the model's own loss was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, context: RoutingContext) -> Tensor:
        ctx.context, ctx.like = context, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale = ctx.context.loss_scale
        one = torch.ones_like(ctx.like)
        return grad, one if scale is None else one * scale.to(one), None


def carry_balance_loss(
    x: Tensor,
    projection: Tensor,
    routing_bias: Tensor,
    blocks: tuple[Block, ...],
    coefficient: float,
    context: RoutingContext,
) -> Tensor:
    """x, whose gradient in backward also holds that of ``coefficient`` times the balancing loss of these tokens.

    A is frozen and d has no gradient, so the loss moves what comes before: the B's of earlier layers, and A where it
    trains. Padding is left out where it is known. Adding the gradient here needs no change to any training loop and
    counts once per backward, also where a checkpointed layer is computed twice.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or projection.requires_grad)):
        return x
    tokens = x.reshape(-1, x.shape[-1])
    mask = context.mask_for(x)
    if mask is not None:
        tokens = tokens[mask]
    if not len(tokens):
        return x
    loss = coefficient * balance_loss(functional.project(tokens, projection), routing_bias, blocks)
    carried: Tensor = _CarryLoss.apply(x, loss, context)
    return carried


class _WatchScale(torch.autograd.Function):
    """The loss itself; backward notes by what it is scaled (gradient accumulation, float16 gradient scaling)."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, context: RoutingContext) -> Tensor:
        ctx.context = context
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.context.loss_scale = grad
        return grad, None


class LossScaleHook:
    """After each forward of the model: lets its layers know how its loss is scaled; 1 where it returns no loss."""

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        self.context.loss_scale = None
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad and loss.dim() == 0:
            output.loss = _WatchScale.apply(loss, self.context)


# --- projections that train (Tables 3 and 15) -------------------------------------------------------------------------

_two_phase: weakref.WeakSet[FlyLoraLinear] = weakref.WeakSet()


def prepare(layer: FlyLoraLinear, adapter: str, config: FlyLoraConfig) -> None:
    """Give a new adapter what its ablation needs; called at the end of the layer's own preparations."""
    for held in (layer.ablations, layer.flylora_trained_A, layer.flylora_steps):
        if adapter in held:  # the adapter is made anew
            del held[adapter]
    ablation = ablation_of(config)
    if ablation is None:
        return
    layer.ablations[adapter] = ablation
    if ablation.trained:
        up = layer.flylora_B[adapter]
        start = torch.empty(up.shape[1], layer.in_features, device="meta") if up.is_meta else layer.projection(adapter)
        layer.flylora_A.pop(adapter, None)
        trained = nn.Parameter(start.detach().clone().to(up.device), requires_grad=up.requires_grad)
        layer.flylora_trained_A[adapter] = trained
    if ablation.trained_steps is not None:
        layer.flylora_steps[adapter] = torch.zeros(1, dtype=torch.int32, device=layer.flylora_B[adapter].device)
    track(layer)


def track(layer: FlyLoraLinear) -> None:
    """Count the optimizer steps of a layer that trains A for some of them."""
    if len(layer.flylora_steps):
        _two_phase.add(layer)
        after_optimizer_steps(_count_steps)


def _count_steps(optimizer: Optimizer) -> None:
    place = positions(optimizer)
    for layer in _two_phase:
        for adapter, steps in layer.flylora_steps.items():
            up = layer.flylora_B[adapter]
            if id(up) in place and up.grad is not None:
                steps.add_(1)


def current_projection(layer: FlyLoraLinear, adapter: str) -> Tensor:
    """A where it trains: with a gradient while it does, and without one from the step on at which it is frozen.

    It stays a parameter that the optimizer holds, so that a resumed run finds the optimizer's state as it was.
    """
    trained: Tensor = layer.flylora_trained_A[adapter]
    limit = layer.ablations[adapter].trained_steps
    frozen = limit is not None and int(layer.flylora_steps[adapter]) >= limit
    return trained.detach() if frozen else trained


def altered(
    ablation: Ablation, layer: FlyLoraLinear, x: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The input and the arguments of `functional.routed_update` with which it computes the ablation.

    Where A trains, the input is y = x A^T, with its gradient to A, and the projection is the identity: the routed
    update of y then equals that of x, and has nothing to know of an A that trains.
    """
    projection = arguments["projection"]
    if ablation.aux_coefficient is not None and layer.training:
        bias, blocks = arguments["routing_bias"], arguments["blocks"]
        x = carry_balance_loss(x, projection, bias, blocks, ablation.aux_coefficient, layer.context)
    if ablation.trained:
        x = functional.project(x, projection)
        arguments = {**arguments, "projection": torch.eye(projection.shape[0], dtype=x.dtype, device=x.device)}
    return x, arguments
