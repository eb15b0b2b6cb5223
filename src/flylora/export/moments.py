"""Gathering what export needs to know of a module's tokens, while the routed adapter runs on calibration text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from flylora import functional
from flylora.adapted import base_of
from flylora.adapter_folder import ModuleFactors, SavedAdapter
from flylora.errors import UserError
from flylora.export.linear import Moments
from flylora.lab.data import CompletionCollator, Encoded
from flylora.projection import canonical_name
from flylora.records import progress


def gather_moments(
    model: PeftModel,
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
    if not any(row.input_ids for row in rows):
        raise UserError("The calibration text has no token: give more text.")
    moments, handles, mask = {}, [], list[Tensor]()
    base = base_of(model)
    # Logits are of no interest here.
    short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    try:
        for name, module in adapted_modules(model, names).items():
            n = features(module)[0]
            moments[name] = Moments.empty(adapter.rank(name), n if inputs else None)
            hook = _hook(adapter.with_in_features(adapter.factors(name), n), moments[name], mask)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            for batch in batches(model, rows, batch_size, "calibration texts", quiet):
                mask[:] = [batch["attention_mask"].bool()]
                base(**{key: batch[key] for key in ("input_ids", "attention_mask")}, use_cache=False, **short)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def parts(adapter: SavedAdapter, model: nn.Module, inputs: bool, budget_gb: float) -> list[list[str]]:
    """The adapted modules in groups whose moments fit in ``budget_gb`` together (a single module always does)."""
    groups: list[list[str]] = [[]]
    used = 0.0
    for name, module in adapted_modules(model, adapter.modules).items():
        n, rank = features(module)[0], adapter.rank(name)
        size = 8e-9 * (3 * rank * rank + (inputs and n * (n + rank)))
        if groups[-1] and used + size > budget_gb:
            groups.append([])
            used = 0.0
        groups[-1].append(name)
        used += size
    return groups


def _hook(factors: ModuleFactors, moments: Moments, mask: list[Tensor]) -> Callable[..., None]:
    down, bias, routing = factors.down(), factors.routing_bias, factors.routing

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        # A module that sees tokens in another arrangement (an expert) counts all that it sees.
        tokens = x[mask[0]] if x.shape[:-1] == mask[0].shape else x.reshape(-1, x.shape[-1])
        y = functional.project(tokens, down.to(x.device))
        z = y if factors.is_linear else functional.routed_codes(y, functional.select(y, bias.to(y.device), routing))
        moments.add(tokens, y, z)

    return add


def batches(
    model: nn.Module, rows: Sequence[Encoded], batch_size: int, what: str, quiet: bool
) -> Iterator[dict[str, Tensor]]:
    """``input_ids``, ``attention_mask`` and ``labels`` of texts of like length, longest first, with a progress bar."""
    device = next(model.parameters()).device
    collate = CompletionCollator()
    ordered = sorted(rows, key=lambda row: -len(row.input_ids))
    with progress(what, len(ordered), quiet) as advance:
        for start in range(0, len(ordered), batch_size):
            chosen = ordered[start : start + batch_size]
            yield {key: value.to(device) for key, value in collate([vars(row) for row in chosen]).items()}
            advance(len(chosen))


def adapted_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a model, with an adapter on it or without, by their names in the base model.

    Raises:
        UserError: one of them is not there.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found.setdefault(canonical_name(name), module)
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"The base model has no module {missing[0]} ({len(missing)} of {len(names)} are missing): give the base "
            "model that the adapter was trained on."
        )
    return {name: found[name] for name in names}


def base_layer(module: nn.Module) -> nn.Module:
    """The layer of the base model, without the adapter around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def features(module: nn.Module) -> tuple[int, int]:
    """(n, m) of a linear layer or Conv1D, with or without an adapter around it."""
    n, m = _get_in_out_features(base_layer(module))
    if n is None or m is None:
        raise UserError(f"A {type(base_layer(module)).__name__} is no linear layer, so its adapter cannot be exported.")
    return int(n), int(m)
