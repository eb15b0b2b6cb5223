r"""The mathematics of FlyLoRA as pure functions (Zou et al., NeurIPS 2025, arXiv 2510.08396v2).

Legend, used in every docstring below:

====== ========== ==================================================================================
symbol shape      meaning
====== ========== ==================================================================================
N                 tokens
n, m              in_features, out_features of the adapted layer
W      (m, n)     frozen pretrained weight
A      (r, n)     frozen sparse random projection: down-projection and implicit router in one
B      (m, r)     trainable up-projection; its column b_i is a rank-1 expert
x      (N, n)     layer input
y      (N, r)     y = x A^T, the projections
z      (N, r)     routed codes: y where a rank was selected, 0 elsewhere
d      (r,)       routing bias; moves the selection only, never the output (Eq. 9)
r, k              total and active rank; p non-zeros in each row of A, density rho = p/n
T                 blocks: independent projections stacked along r, each with its own top-k (1 unless merged)
====== ========== ==================================================================================

Forward (Eq. 7, 8, 10, 11):  out = W x + s * sum_{i in I} b_i y_i,  I = the k largest scores,  s = alpha / r.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Selection = Literal["magnitude", "signed", "biased_magnitude", "random", "all"]


class Block(NamedTuple):
    """Routing of one projection: ``k`` of ``r`` ranks act on a token, picked by ``selection``.

    ``noise_seed`` is read by the selection ``random`` alone.
    """

    r: int
    k: int
    selection: Selection = "magnitude"
    noise_seed: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether every rank acts on every token, so that the adapter is the plain product B A."""
        return self.k >= self.r or self.selection == "all"


# --- routing -------------------------------------------------------------------------------------------------


def project(x: Tensor, projection: Tensor) -> Tensor:
    """y = x A^T (Eq. 7), in float32 or wider and outside autocast, so that every dtype routes alike.

    Args:
        x: (N, n). projection: A, (r, n), on the bfloat16 grid.

    Returns:
        (N, r), float32, or float64 for a float64 input.
    """
    dtype = x.dtype if x.dtype == projection.dtype else torch.promote_types(x.dtype, torch.float32)
    with _without_autocast(x.device.type):
        return F.linear(_as(x, dtype), _as(projection, dtype))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; a look at it is quicker than a call of ``to`` that does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off inside the block. Entering torch's own context takes longer than a small layer's products."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type=device_type, enabled=False)
    return nullcontext()


def _hash_noise(y: Tensor, seed: int) -> Tensor:
    """A pseudo-random number in [0, 1) for each entry of y (N, r), a pure function of the token's y and the seed.

    Being a function of the token it is the same again when a checkpointed layer is recomputed, and moves no state.
    """
    bits = y.detach().float().contiguous().view(torch.int32).to(torch.int64)
    rank = torch.arange(y.shape[1], device=y.device, dtype=torch.int64)
    token = (bits * (2 * rank + 1) * 0x9E3779B1).sum(dim=1, keepdim=True)
    mixed = (token + (rank + 1) * 0x85EBCA6B + seed) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x846CA68B):
        mixed = ((mixed ^ (mixed >> 16)) * multiplier) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) & 0xFFFFFF).to(torch.float32) / float(1 << 24)


def scores(y: Tensor, routing_bias: Tensor, selection: Selection, noise_seed: int = 0) -> Tensor:
    """The scores whose k largest are selected.

    ============================ =============================================================================
    ``magnitude`` (default)       abs(y) + d: Eq. 8 picks by magnitude; outside the absolute value d balances
    ``signed``                    y + d: Eq. 10 to the letter
    ``biased_magnitude``          abs(y + d): for reproduction only, a large negative d raises the score
    ``random``                    seeded pseudo-random numbers (Table 14); d is ignored
    ============================ =============================================================================

    Args:
        y: (N, r). routing_bias: d, (r,), in the units of y.

    Returns:
        (N, r), in the dtype of y.
    """
    if selection == "magnitude":
        return y.abs() + _as(routing_bias, y.dtype)
    if selection == "signed":
        return y + _as(routing_bias, y.dtype)
    if selection == "biased_magnitude":
        return (y + _as(routing_bias, y.dtype)).abs()
    if selection == "random":
        return _hash_noise(y, noise_seed)
    raise ValueError(f"selection '{selection}' has no scores")


def select(y: Tensor, routing_bias: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """I, the selected ranks of each token: in every block the k largest scores (Eq. 8, 10).

    Args:
        y: (N, sum of r). routing_bias: (sum of r,). blocks: how r is divided and how each part is routed.

    Returns:
        (N, sum of k) int64 indices into the rank axis; unordered within a block.
    """
    first = blocks[0]
    if len(blocks) == 1 and not first.is_linear:
        return _largest(scores(y, routing_bias, first.selection, first.noise_seed), first.k)
    stackable = first.selection != "random" and not first.is_linear  # noise depends on a rank's place in its block
    if len(blocks) > 1 and stackable and all(block == first for block in blocks):
        shape = (y.shape[0], len(blocks), first.r)
        score = scores(y, routing_bias, first.selection, first.noise_seed).view(shape)
        chosen = _largest(score, first.k)
        offsets = torch.arange(len(blocks), device=y.device).mul(first.r).view(1, -1, 1)
        return (chosen + offsets).flatten(1)
    parts, start = [], 0
    for block in blocks:
        stop = start + block.r
        if block.is_linear:
            part = torch.arange(start, stop, device=y.device).expand(y.shape[0], block.r)
        else:
            score = scores(y[:, start:stop], routing_bias[start:stop], block.selection, block.noise_seed)
            part = _largest(score, block.k)
            part = part + start if start else part
        parts.append(part)
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


# Below so many scores torch.topk is as fast as the way round it.
_WORTH_SORTING = 2048


def _largest(score: Tensor, k: int) -> Tensor:
    """Indices (..., k), int64, of the k largest along the last axis, in no order; k < r.

    On the CPU torch.topk takes longer than any product of the layer. There NumPy, which sorts short rows with vector
    instructions, finds the k-th largest score instead, and the indices are those of the scores not below it; rows where
    more than k are not (equal scores), and scores that are not finite, are left to torch.topk.
    """
    on_cpu = score.device.type == "cpu" and score.dtype == torch.float32
    if not on_cpu or score.numel() < _WORTH_SORTING or torch.compiler.is_compiling():
        return score.topk(k, dim=-1, sorted=False).indices
    r = score.shape[-1]
    rows = score.detach().contiguous().view(-1, r)
    ascending = np.sort(rows.numpy(), axis=1)
    kept = rows >= torch.from_numpy(ascending[:, r - k, None])
    places = np.flatnonzero(kept.numpy())
    if len(places) != len(rows) * k or not np.isfinite(ascending[:, -1]).all():
        return score.topk(k, dim=-1, sorted=False).indices
    return torch.from_numpy(places).view(*score.shape[:-1], k).remainder_(r)


def routed_codes(y: Tensor, indices: Tensor) -> Tensor:
    """z (N, r): y at the selected ranks and 0 elsewhere."""
    return torch.zeros_like(y).scatter_(1, indices, y.gather(1, indices))


def _index_dtype(r: int) -> torch.dtype:
    """The smallest integer type that holds a rank's index: what backward keeps is k of these a token."""
    return torch.uint8 if r <= 256 else torch.int16 if r <= 32768 else torch.int32


class _RoutedLinear(torch.autograd.Function):
    """out = base + s z B^T, its exact gradient to x and B; keeps k codes and k small indices a token, never x.

    ``base`` is either given (``base_out``, any kind of layer) or the frozen product x W^T + bias computed here, in
    which case the routed update is added in place and backward forms both input gradients in one buffer: no temporary
    of the output's or input's size. Expert loads are counted in backward, so that a recomputed forward counts once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_out: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        projection: Tensor,
        up: Tensor,
        routing_bias: Tensor,
        load: Tensor | None,
        token_mask: Tensor | None,
        blocks: tuple[Block, ...],
        scaling: float,
    ) -> Tensor:
        out, chosen, kept = _routed_forward(x, base_out, weight, bias, projection, up, routing_bias, blocks, scaling)
        indices = None if chosen is None else chosen.to(_index_dtype(projection.shape[0]))
        ctx.save_for_backward(indices, kept, projection, up, weight)
        # Not among the saved tensors: backward adds to the load in place, which autograd would take for a mistake as
        # soon as two forwards precede their backwards; and a checkpointed layer must count by its own forward's mask.
        ctx.load, ctx.token_mask = load, token_mask
        ctx.scaling = scaling
        ctx.in_shape, ctx.in_dtype = x.shape, x.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        indices, kept, projection, up, weight = ctx.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        need_x, need_up = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        chosen = None if indices is None else indices.long()
        grad_x = grad_up = None
        with _without_autocast(grad.device.type):
            if need_x:
                grad_z = grad @ _as(up, grad.dtype)
                if chosen is not None:
                    grad_z = torch.zeros_like(grad_z).scatter_(1, chosen, grad_z.gather(1, chosen))
                down = _as(projection, grad.dtype)
                if weight is None:
                    grad_x = (grad_z * ctx.scaling) @ down
                else:
                    grad_x = (grad @ _as(weight, grad.dtype)).addmm_(grad_z, down, alpha=ctx.scaling)
                grad_x = _as(grad_x, ctx.in_dtype).view(ctx.in_shape)
            if need_up:
                z = _as(kept, grad.dtype)
                if chosen is not None:
                    z = z.new_zeros(z.shape[0], projection.shape[0]).scatter_(1, chosen, z)
                # Not as g^T z, which takes twice as long on the CPU.
                grad_up = _as((z.t() @ grad).t(), up.dtype).mul_(ctx.scaling)
                if ctx.load is not None and chosen is not None:  # only here: a frozen adapter is not balanced
                    add_expert_load(ctx.load, chosen, ctx.token_mask)
        grad_base = grad_out if ctx.needs_input_grad[1] else None
        return grad_x, grad_base, None, None, None, grad_up, None, None, None, None, None


def _routed_forward(
    x: Tensor,
    base_out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    projection: Tensor,
    up: Tensor,
    routing_bias: Tensor,
    blocks: tuple[Block, ...],
    scaling: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The output (..., m), the selected ranks (N, k) int64 (None: all of them) and their codes (N, k)."""
    y = project(x.reshape(-1, x.shape[-1]), projection)
    if all(block.is_linear for block in blocks):
        chosen, kept, z = None, y, y
    else:
        chosen = select(y, routing_bias, blocks)
        kept = y.gather(1, chosen)
        z = torch.zeros_like(y).scatter_(1, chosen, kept)
    with _without_autocast(x.device.type):
        if base_out is None:
            assert weight is not None
            # On x as it came: a strided x flattened first gives other last bits than the layer itself would.
            out = F.linear(x, weight, bias).contiguous()
            out.view(-1, out.shape[-1]).addmm_(_as(z, out.dtype), _as(up, out.dtype).t(), alpha=scaling)
        else:
            base = base_out.reshape(-1, base_out.shape[-1])
            out = torch.addmm(base, _as(z, base.dtype), _as(up, base.dtype).t(), alpha=scaling).view(base_out.shape)
    return out, chosen, kept


def routed_update(
    base_out: Tensor,
    x: Tensor,
    projection: Tensor,
    up: Tensor,
    routing_bias: Tensor,
    blocks: tuple[Block, ...],
    scaling: float,
    load: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """out = base_out + s * sum_{i in I} b_i y_i for every token (Eq. 7, 8, 10, 11).

    Args:
        base_out: (..., m), what the frozen layer gave. x: (..., n), its input.
        projection: A, (r, n). up: B, (m, r). routing_bias: d, (r,).
        blocks: how the rank axis is divided and routed. scaling: s = alpha / r.
        load: (r,) int64; backward adds to it how many tokens chose each rank. None: nothing is counted.
        token_mask: (N,) bool; tokens that are False (padding) are not counted.

    Returns:
        (..., m), in the dtype of ``base_out``. Gradients: to base_out, x and B, all exact.
    """
    return _routed(x, base_out, None, None, projection, up, routing_bias, load, token_mask, blocks, scaling)


def routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor,
    up: Tensor,
    routing_bias: Tensor,
    blocks: tuple[Block, ...],
    scaling: float,
    load: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The frozen product and its routed update in one pass: x W^T + bias + s z B^T; see [`routed_update`].

    ``weight`` (m, n) and ``bias`` (m,) receive no gradient, whatever their ``requires_grad``.
    """
    return _routed(x, None, weight, bias, projection, up, routing_bias, load, token_mask, blocks, scaling)


def _routed(
    x: Tensor,
    base_out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    projection: Tensor,
    up: Tensor,
    routing_bias: Tensor,
    load: Tensor | None,
    token_mask: Tensor | None,
    blocks: tuple[Block, ...],
    scaling: float,
) -> Tensor:
    if torch.is_grad_enabled():
        return _RoutedLinear.apply(
            x, base_out, weight, bias, projection, up, routing_bias, load, token_mask, blocks, scaling
        )
    return _routed_forward(x, base_out, weight, bias, projection, up, routing_bias, blocks, scaling)[0]


class _PackedDropout(torch.autograd.Function):
    """Dropout that keeps one bit an entry for backward; PyTorch's keeps a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
        ctx.save_for_backward(_pack_bits(keep))
        ctx.scale = 1 / (1 - p)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return (grad_out * _unpack_bits(packed, grad_out.shape)).mul_(ctx.scale), None


def _bit_values(device: torch.device) -> Tensor:
    return torch.ones(8, dtype=torch.uint8, device=device) << torch.arange(8, dtype=torch.uint8, device=device)


def _pack_bits(mask: Tensor) -> Tensor:
    """Booleans of any shape as bytes, eight in one."""
    flat = F.pad(mask.reshape(-1), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat * _bit_values(mask.device)).sum(dim=1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """What [`_pack_bits`] was given."""
    flat = (packed.unsqueeze(1) & _bit_values(packed.device)) != 0
    return flat.view(-1)[: shape.numel()].view(shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each entry zeroed with probability p and the others divided by 1 - p; one bit an entry is kept.

    Args:
        x: any shape. p: in [0, 1).
    """
    if torch.compiler.is_compiling():  # the compiler draws its mask again in backward by itself
        return F.dropout(x, p)
    dropped: Tensor = _PackedDropout.apply(x, p)
    return dropped


# --- load balancing ------------------------------------------------------------------------------------------


def add_expert_load(load: Tensor, indices: Tensor, token_mask: Tensor | None = None) -> None:
    """c_i += how many tokens chose rank i, in place.

    Args:
        load: c, (r,) int64. indices: (N, k) int64. token_mask: (N,) bool, False where a token must not count.
    """
    if token_mask is None:
        weights = torch.ones_like(indices)
    else:
        weights = token_mask.to(torch.int64).unsqueeze(1).expand_as(indices)
    load.scatter_add_(0, indices.reshape(-1), weights.reshape(-1))


def balance_steps(load: Tensor, block_ranks: tuple[int, ...]) -> Tensor:
    """sign(mean(c) - c_i), the change of the routing bias in steps of u (Eq. 9), block by block.

    Args:
        load: c, (r,) int64, the tokens that chose each rank since the last step. block_ranks: r of each block.

    Returns:
        (r,) int32 of -1, 0, 1; all 0 for a block that saw no token.
    """
    # sign(sum(c) - r c_i) is the same sign without leaving the integers.
    parts = [torch.sign(part.sum() - part * part.numel()) for part in load.split(list(block_ranks))]
    return torch.cat(parts).to(torch.int32)
