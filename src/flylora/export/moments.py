"""Gathering what export needs to know of a module's tokens, while the routed adapter runs on calibration text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flylora import functional
from flylora.activations import Accumulator, features, gather, modules_by_name
from flylora.adapter_folder import ModuleFactors, SavedAdapter
from flylora.export.linear import Moments
from flylora.texts import Encoded


def gather_moments(
    model: nn.Module,
    adapter: SavedAdapter,
    names: Sequence[str],
    rows: Sequence[Encoded],
    batch_size: int,
    *,
    inputs: bool = False,
    quiet: bool = False,
) -> dict[str, Moments]:
    """Second moments of projections and routed codes in adapted modules, in one pass over the texts.

    Sums are in float64, O(R^2) a module, or O(n^2) with those of the inputs. Padding does not count.

    Args:
        model: with the adapter active, in evaluation mode. adapter: the same one, as saved. names: of the modules.
        rows: the texts. batch_size: texts per forward pass.
        inputs: whether to keep the moments of the inputs too. quiet: show no progress.

    Raises:
        UserError: there is no token, or the model lacks a module.
    """
    moments, accumulators = {}, {}
    for name, module in modules_by_name(model, names).items():
        n = features(module)[0]
        moments[name] = Moments.empty(adapter.rank(name), n if inputs else None)
        accumulators[name] = _accumulator(adapter.with_in_features(adapter.factors(name), n), moments[name])
    gather(model, accumulators, rows, batch_size=batch_size, quiet=quiet)
    return moments


def _accumulator(factors: ModuleFactors, moments: Moments) -> Accumulator:
    down, bias, routing = factors.down(), factors.routing_bias, factors.routing

    def add(x: Tensor, part: int) -> None:
        y = functional.project(x, down.to(x.device))
        z = y if factors.is_linear else functional.routed_codes(y, functional.select(y, bias.to(y.device), routing))
        moments.add(x, y, z)

    return add


def parts(adapter: SavedAdapter, model: nn.Module, inputs: bool, budget_gb: float) -> list[list[str]]:
    """The adapted modules in groups whose moments fit in ``budget_gb`` together (a single module always does)."""
    groups: list[list[str]] = [[]]
    used = 0.0
    for name, module in modules_by_name(model, adapter.modules).items():
        n, rank = features(module)[0], adapter.rank(name)
        size = 8e-9 * (3 * rank * rank + (inputs and n * (n + rank)))
        if groups[-1] and used + size > budget_gb:
            groups.append([])
            used = 0.0
        groups[-1].append(name)
        used += size
    return groups
