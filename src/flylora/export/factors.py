"""From a saved adapter and what was learnt from text to one linear map a module."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flylora.adapter_folder import ModuleFactors, SavedAdapter
from flylora.errors import UserError
from flylora.export.config import Method
from flylora.export.linear import (
    Moments,
    calibrated_codes,
    gaussian_scales,
    least_squares_scales,
    regressed_down,
    squared_error,
)
from flylora.least_squares import cut_rank

RIDGES = {"calibrated": 1e-3, "regression": 1e-1}
"""The ridge of each method where none is given; measured, see docs/export.md."""


@dataclass(frozen=True)
class LinearFactors:
    """The exported update of one module, ``up @ down``.

    Attributes:
        name: the module's, in the base model.
        up: U, (m, q) float32, the scaling folded in. down: D, (q, n) float32.
        errors: what was measured on the calibration tokens and by the rank limit; see [`linear_factors`].
    """

    name: str
    up: Tensor
    down: Tensor
    errors: dict[str, float] = field(default_factory=dict)


def check_method(adapter: SavedAdapter, method: Method, has_text: bool, rank: int | None) -> bool:
    """Whether the adapter is linear, hence exported exactly.

    Raises:
        UserError: it routes and there is no text for a method that needs some, or the rank is larger than its own.
    """
    linear = all(adapter.small(module).is_linear for module in adapter.modules)
    if not linear and method != "dense" and not has_text:
        raise UserError(
            f"{adapter.path} routes (k < r), so the method {method} needs text to fit a linear map to it: name a "
            "task or a text file with --calibrate, or choose --method dense."
        )
    largest = max(adapter.rank(module) for module in adapter.modules)
    if rank is not None and rank > largest:
        raise UserError(
            f"rank is {rank}, but {adapter.path} has rank {largest} and its LoRA cannot use more: give at most "
            f"{largest}, or leave rank out."
        )
    return linear


def linear_factors(
    factors: ModuleFactors, method: Method, ridge: float | None, rank: int | None, moments: Moments | None
) -> LinearFactors:
    """The linear map nearest to one module's update, cut to ``rank``.

    ============== =========================================== ===================================================
    method         U D                                         needs
    ============== =========================================== ===================================================
    dense          B diag(c) A, one scale c for each block     nothing; c by least squares where there are moments
    calibrated     B C A, see `linear.calibrated_codes`        moments of the codes
    regression     B D,   see `linear.regressed_down`          moments of the inputs
    (any)          B A                                         a linear adapter (k = r): exact
    ============== =========================================== ===================================================

    Args:
        factors: of the module, with n known. ridge: None for the method's own, [`RIDGES`].
        moments: of the calibration tokens, if there are any.

    Returns:
        Factors with the errors ``dense`` and ``fit`` (the share of E ||B z||^2 on the calibration tokens that the best
        scale and the method miss) and ``cut`` (the share that the rank limit loses, of E ||U D x||^2 where there are
        moments, else of ||U D||_F^2).
    """
    up, down = factors.scaled_up(torch.float64), factors.down().double()
    gram = None if moments is None else moments.yy
    errors: dict[str, float] = {}
    if not factors.is_linear:
        down, gram, errors = _fitted(factors, up, down, method, ridge, moments)
    if rank is not None and rank < factors.rank:
        up, down, errors["cut"] = cut_rank(up, down, rank, gram)
    return LinearFactors(factors.name, up.float(), down.float(), errors)


def _fitted(
    factors: ModuleFactors, up: Tensor, down: Tensor, method: Method, ridge: float | None, moments: Moments | None
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """D, the sum of (D x)(D x)^T over the calibration tokens, and what the fit misses of the routed update."""
    if moments is None:
        return gaussian_scales(factors.routing).unsqueeze(1) * down, None, {}
    scales = least_squares_scales(up, moments, factors.routing)
    dense = torch.diag(scales)
    errors = {"dense": squared_error(up, moments.zz, moments.zy @ dense, dense @ moments.yy @ dense)}
    codes = (
        dense
        if method == "dense"
        else calibrated_codes(moments, scales, RIDGES["calibrated"] if ridge is None else ridge)
    )
    fitted, crossed, gram = codes @ down, moments.zy @ codes.t(), codes @ moments.yy @ codes.t()
    if method == "regression":
        assert moments.zx is not None
        assert moments.xx is not None
        fitted = regressed_down(moments, codes @ down, RIDGES["regression"] if ridge is None else ridge)
        crossed, gram = moments.zx @ fitted.t(), fitted @ moments.xx @ fitted.t()
    errors["fit"] = squared_error(up, moments.zz, crossed, gram)
    return fitted, gram, errors
