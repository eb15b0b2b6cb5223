"""From saved adapters to a merged adapter folder, module by module: what is in memory is one module at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor

from flylora.adapter_folder import KEY_PREFIX, WEIGHTS_FILE, Kind, SavedAdapter, TensorFile, save_config
from flylora.errors import UserError
from flylora.lab.baselines.split_lora import SplitLoraConfig
from flylora.least_squares import cut_matrix, cut_rank
from flylora.merging.layout import (
    Layout,
    MergedIdentity,
    ModuleLayout,
    check_compatible,
    merged_down,
    merged_identity,
    plan,
)
from flylora.merging.methods import (
    Update,
    best_ridge,
    knots,
    least_squares,
    least_squares_error,
    linear_share,
    update_seed,
    weighted_sum,
)
from flylora.merging.table import Method, effective_weights, method
from flylora.records import new_folder, progress
from flylora.tuner.config import FlyLoraConfig
from flylora.tuner.layer import ProjectionState, identity_tensors

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

# Blocks have alpha None, which the tuner reads as a scaling of 2 in every module whatever its rank; a power of two, so
# that adapters with the usual alpha = 2 r keep their B bit for bit.
_BLOCK_SCALING = 2.0


class Statistics(Protocol):
    """Where least squares finds the Gram matrices of its inputs' tasks."""

    def grams(self, task: int, module: str) -> tuple[Tensor, Tensor]:
        """G_t of one module, (R, R) float64, over each of two halves of task t's texts."""
        ...

    def share(self, task: int) -> tuple[float, float]:
        """The share of task t's tokens in each half; they sum to 1."""
        ...


@dataclass(frozen=True)
class MergeSpec:
    """How to merge: the part of a merge's settings that shapes its result; see `config.MergeConfig`."""

    method: str = "average"
    weights: tuple[float, ...] | None = None
    rank: int | None = None
    density: float | None = None
    ridge: float | None = None
    share: bool = True
    seed: int = 0


@dataclass
class MergeReport:
    """What a merge measured while it ran.

    Attributes:
        weights: as they were applied. routed: whether the result routes. shared: whether all inputs shared A.
        rank_error: relative Frobenius error of the rank limit by module, where there is one.
        ridge: the ridge used by module, for least squares.
        objective: least squares' error relative to that of the weighted average, by module.
    """

    weights: list[float]
    routed: bool
    shared: bool
    rank_error: dict[str, float] = field(default_factory=dict)
    ridge: dict[str, float] = field(default_factory=dict)
    objective: dict[str, float] = field(default_factory=dict)


def merge_to(
    out: str | Path,
    adapters: Sequence[SavedAdapter],
    spec: MergeSpec,
    statistics: Statistics | None = None,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
    extra: Callable[[Path, MergeReport], None] | None = None,
    quiet: bool = False,
) -> MergeReport:
    """Merge adapters into a new folder; nothing appears under its name before all is written.

    Args:
        out: the folder. adapters: the inputs, all of one kind.
        spec: how. statistics: for least squares.
        base_model: the name to give the base model, and the user's word that it is that of all inputs.
        extra: called with the temporary folder and the report at the end, to write more files into it.
        quiet: show no progress.

    Raises:
        UserError: the inputs or the settings do not allow it.
    """
    row = method(spec.method)
    check_compatible(adapters, base_model)
    weights = effective_weights(row, spec.weights, len(adapters))
    layout = plan(adapters, spec.share)
    if row.calibrated and statistics is None and len(adapters) > 1:
        raise UserError(
            f"{row.name} needs text of each task: name one task or calibration file for each adapter with calibrate."
        )
    work = _worker(row, layout, spec, weights, statistics)
    config = work.config(base_model)
    tensors = {key: shape for module in layout.modules for key, shape in work.shapes(module).items()}
    with new_folder(out, overwrite) as folder:
        save_config(config, folder)
        with (
            TensorFile(folder / WEIGHTS_FILE, tensors) as file,
            progress(f"{row.name} of {len(adapters)} adapters", len(layout.modules), quiet) as advance,
        ):
            for module in layout.modules:
                for key, tensor in work.tensors(module).items():
                    file.write(key, tensor)
                advance(1)
        if extra is not None:
            extra(folder, work.report)
    return work.report


# --- what becomes of one module --------------------------------------------------------------------------------


@dataclass
class _Worker:
    """Base of the two kinds of result; holds what both need."""

    row: Method
    layout: Layout
    spec: MergeSpec
    weights: list[float]
    statistics: Statistics | None
    report: MergeReport

    def __post_init__(self) -> None:
        self._locals = {module: self.layout.at(module) for module in self.layout.modules}
        self.prepare()

    def prepare(self) -> None:
        """Work out everything that shapes and config depend on."""
        raise NotImplementedError

    def config(self, base_model: str | None) -> PeftConfig:
        raise NotImplementedError

    def shapes(self, module: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        raise NotImplementedError

    def tensors(self, module: str) -> dict[str, Tensor]:
        raise NotImplementedError

    def placed(self, local: ModuleLayout, out_scaling: float) -> dict[int, Tensor]:
        """B_t' of the inputs that adapt the module, in units of the result's scaling."""
        ups = {}
        for t in local.factors:
            factors = self.layout.adapters[t].factors(local.name)
            ratio = factors.scaling / out_scaling
            up = factors.up if factors.up.dtype == torch.float64 else factors.up.float()
            ups[t] = local.place(t, up if ratio == 1.0 else up * ratio)
        return ups

    def weighted(self, local: ModuleLayout, out_scaling: float) -> Tensor:
        """sum_t w_t B_t' (m, R), each input's columns added where they stand."""
        adapters = self.layout.adapters
        ups = {t: adapters[t].factors(local.name) for t in local.factors}
        wide = any(factors.up.dtype == torch.float64 for factors in ups.values())
        out = torch.zeros(local.out_features, local.rank, dtype=torch.float64 if wide else torch.float32)
        for place in local.places:
            factors = ups[place.adapter]
            target = out[:, place.target : place.target + place.stop - place.start]
            # The factor first: it is 1 for one adapter at weight 1, which then stays as it is bit for bit.
            factor = self.weights[place.adapter] * (factors.scaling / out_scaling)
            target.add_(factors.up[:, place.start : place.stop].to(out.dtype), alpha=factor)
        return out

    def combined(self, local: ModuleLayout, out_scaling: float) -> Tensor:
        """B (m, R) of the methods that work on codes."""
        if not self.row.calibrated or len(self.layout.adapters) == 1:
            return self.weighted(local, out_scaling)
        ups = self.placed(local, out_scaling)
        held = list(ups)
        average = weighted_sum([ups[t] for t in held], [self.weights[t] for t in held])
        assert self.statistics is not None
        # An input that leaves the module alone wants no update there.
        tasks = range(len(self.layout.adapters))
        targets = [ups[t] if t in ups else torch.zeros_like(average) for t in tasks]
        halves = [self.statistics.grams(t, local.name) for t in tasks]
        shares = [self.statistics.share(t) for t in tasks]
        grams = [a * x + b * y for (x, y), (a, b) in zip(halves, shares, strict=True)]
        positive = [abs(weight) for weight in self.weights]
        ridge = self.spec.ridge
        if ridge is None:
            ridge = best_ridge(targets, halves, positive, average, RIDGES)
        up = least_squares(targets, grams, positive, average, ridge)
        before = least_squares_error(average, targets, grams, positive)
        after = least_squares_error(up, targets, grams, positive)
        self.report.ridge[local.name] = ridge
        self.report.objective[local.name] = after / before if before else 1.0
        return up

    def updates(self, local: ModuleLayout, shared_scaling: float | None) -> list[Update]:
        """The inputs' updates; with ``shared_scaling``, B alone in units of it."""
        updates = []
        for t in local.factors:
            adapter = self.layout.adapters[t]
            seed = update_seed(self.spec.seed, adapter.fingerprint, local.name)
            factors = adapter.factors(local.name)
            if shared_scaling is not None:
                updates.append(Update(factors.scaled_up() / shared_scaling, None, seed))
                continue
            up = factors.scaled_up()
            shares = [linear_share(block) for block in factors.routing]
            if any(share != 1.0 for share in shares):
                columns = zip(shares, [block.r for block in factors.routing], strict=True)
                up = up * torch.cat([torch.full((r,), share) for share, r in columns])
            updates.append(Update(up, factors.down(self.layout.in_features(local.name)), seed))
        return updates

    def held_weights(self, local: ModuleLayout) -> list[float]:
        return [self.weights[t] for t in local.factors]

    @property
    def density(self) -> float:
        given = self.spec.density
        return given if given is not None else self.row.density or 1.0

    def matrix(self, updates: list[Update], weights: Sequence[float]) -> Tensor:
        assert self.row.combine is not None
        return self.row.combine(updates, weights, self.density)


class _RoutedWorker(_Worker):
    """The result is a FlyLoRA adapter: every input's routing is kept as a block."""

    def prepare(self) -> None:
        self._identities: dict[str, MergedIdentity] = {
            module: merged_identity(self.layout, local) for module, local in self._locals.items()
        }
        self._stored = any(identity.stored is not None for identity in self._identities.values())
        first = self.layout.adapters[0].config
        assert isinstance(first, FlyLoraConfig)
        # One block that every input shares needs no list of blocks: the result is an adapter like its inputs.
        self._like_inputs = len(self.layout.slots) == 1 and first.blocks is None
        self._single = len(self.layout.adapters) == 1

    def config(self, base_model: str | None) -> PeftConfig:
        first = self.layout.adapters[0].config
        assert isinstance(first, FlyLoraConfig)
        config = copy.deepcopy(first)
        _set_common(config, self.layout, base_model)
        config.save_projection = self._stored
        config.projection_training, config.projection_steps = "frozen", None  # a trained A is only stored
        config.remember_in_features(self.layout.known_in_features())
        if not (self._like_inputs or self._single):
            config.alpha, config.density, config.rank_pattern = None, None, {}
            config.blocks = [asdict(block) for block in self.layout.config_blocks()]
            config.__post_init__()
        elif self._like_inputs:
            block = self.layout.slots[0].block
            assert block is not None
            config.balance_rate = block.balance_rate
        return config

    def _scaling(self, module: str) -> float:
        if not (self._like_inputs or self._single):
            return _BLOCK_SCALING
        # alpha_pattern does not exist for FlyLoRA, so the first input's own rule holds in every module.
        config = self.layout.adapters[0].config
        assert isinstance(config, FlyLoraConfig)
        return config.scaling_at(module)

    def shapes(self, module: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        local, identity = self._locals[module], self._identities[module]
        dtype = torch.float32
        if self._single:
            dtype = self.layout.adapters[0].factors(module).up.dtype
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "flylora_B": (dtype, (local.out_features, local.rank)),
            "flylora_d": (torch.int32, (local.rank,)),
            "flylora_seed": (torch.int64, (len(identity.seeds),)),
            "flylora_fingerprint": (torch.uint8, (len(identity.seeds), 32)),
        }
        if identity.stored is not None:
            shapes["flylora_A_values"] = (torch.float32, tuple(identity.stored.values.shape))
            shapes["flylora_A_columns"] = (torch.int32, tuple(identity.stored.columns.shape))
        return {f"{KEY_PREFIX}{module}.{name}": shape for name, shape in shapes.items()}

    def tensors(self, module: str) -> dict[str, Tensor]:
        local, identity = self._locals[module], self._identities[module]
        scaling = self._scaling(module)
        if self.row.works_on == "codes":
            up = self.combined(local, scaling)
        else:
            up = self.matrix(self.updates(local, scaling), self.held_weights(local))
        seeds, digests = identity_tensors(ProjectionState(identity.seeds, identity.fingerprints))
        tensors = {
            "flylora_B": up,
            "flylora_d": identity.steps,
            "flylora_seed": seeds,
            "flylora_fingerprint": digests,
        }
        if identity.stored is not None:
            tensors["flylora_A_values"], tensors["flylora_A_columns"] = identity.stored
        return {f"{KEY_PREFIX}{module}.{name}": tensor for name, tensor in tensors.items()}


class _LoraWorker(_Worker):
    """The result is a plain PEFT LoRA: of LoRA inputs, or of routed ones that a matrix method makes linear."""

    def prepare(self) -> None:
        self._single = len(self.layout.adapters) == 1 and self.layout.kind == "lora" and self.spec.rank is None
        self._keeps_factors = self.row.works_on == "codes"
        self._ranks = {module: self._rank(local) for module, local in self._locals.items()}

    def _rank(self, local: ModuleLayout) -> int:
        whole = sum(self.layout.adapters[t].rank(local.name) for t in local.factors)
        wanted = whole if self.spec.rank is None else min(self.spec.rank, whole)
        return min(wanted, local.out_features, self.layout.in_features(local.name)) if not self._single else whole

    def config(self, base_model: str | None) -> PeftConfig:
        first = self.layout.adapters[0].config
        if self._single and self._keeps_factors:
            config = copy.deepcopy(first)
            _set_common(config, self.layout, base_model)
            return config
        ranks = sorted(self._ranks.values())
        most = max(set(ranks), key=ranks.count)
        others = {module: rank for module, rank in self._ranks.items() if rank != most}
        config = LoraConfig(
            r=most,
            lora_alpha=most,
            rank_pattern=others,
            alpha_pattern=dict(others),
            fan_in_fan_out=bool(getattr(first, "fan_in_fan_out", False)),
            task_type=first.task_type,
            revision=first.revision,
            inference_mode=True,
        )
        config.auto_mapping = first.auto_mapping
        _set_common(config, self.layout, base_model)
        return config

    def shapes(self, module: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        local, rank = self._locals[module], self._ranks[module]
        dtype = self.layout.adapters[0].factors(module).up.dtype if self._single else torch.float32
        return {
            f"{KEY_PREFIX}{module}.lora_A.weight": (dtype, (rank, self.layout.in_features(module))),
            f"{KEY_PREFIX}{module}.lora_B.weight": (dtype, (local.out_features, rank)),
        }

    def tensors(self, module: str) -> dict[str, Tensor]:
        local, rank = self._locals[module], self._ranks[module]
        up, down = self._factors(local, rank)
        missing = rank - up.shape[1]
        if missing > 0:  # the update has less rank than there is room for
            up = torch.nn.functional.pad(up, (0, missing))
            down = torch.nn.functional.pad(down, (0, 0, 0, missing))
        return {
            f"{KEY_PREFIX}{module}.lora_A.weight": down.contiguous(),
            f"{KEY_PREFIX}{module}.lora_B.weight": up.contiguous(),
        }

    def _factors(self, local: ModuleLayout, rank: int) -> tuple[Tensor, Tensor]:
        if self._keeps_factors:
            scaling = self.layout.adapters[0].scaling(local.name) if self._single else 1.0
            up, down = self.combined(local, scaling), merged_down(self.layout, local)
            if rank == local.rank:
                return up, down
            up, down, error = cut_rank(up, down, rank)
        else:
            updates, weights = self.updates(local, None), self.held_weights(local)
            if self.row.common_basis:
                up, down = knots(updates, weights, lambda parts: self.matrix(parts, weights))
                if up.shape[1] <= rank:
                    return up, down
                up, down, error = cut_rank(up, down, rank)
            else:
                downs = [update.down.t() for update in updates if update.down is not None]
                matrix = self.matrix(updates, weights)
                seed = update_seed(self.spec.seed, "range", local.name)
                up, down, error = cut_matrix(matrix, rank, seed, torch.cat(downs, dim=1))
        self.report.rank_error[local.name] = math.sqrt(error)
        return up, down


class _SplitLoraWorker(_Worker):
    """The result is a Split-LoRA adapter: every input's experts are a group with their own router."""

    def prepare(self) -> None:
        configs = [adapter.config for adapter in self.layout.adapters]
        self._configs = [config for config in configs if isinstance(config, SplitLoraConfig)]
        self._rank = sum(config.r for config in self._configs)
        self._experts = sum(config.experts for config in self._configs)

    def config(self, base_model: str | None) -> PeftConfig:
        first = self._configs[0]
        config = copy.deepcopy(first)
        _set_common(config, self.layout, base_model)
        config.r, config.experts, config.k = self._rank, self._experts, first.active_in_group
        config.groups = sum(each.groups for each in self._configs)
        config.alpha = float(self._rank)
        return config

    def shapes(self, module: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        local, n = self._locals[module], self.layout.in_features(module)
        shapes = {
            "splitlora_A": (self._rank, n),
            "splitlora_B": (local.out_features, self._rank),
            "splitlora_router": (self._experts, n),
        }
        return {f"{KEY_PREFIX}{module}.{name}": (torch.float32, shape) for name, shape in shapes.items()}

    def tensors(self, module: str) -> dict[str, Tensor]:
        local = self._locals[module]
        tensors = {
            "splitlora_A": merged_down(self.layout, local),
            "splitlora_B": self.weighted(local, 1.0),
            "splitlora_router": torch.cat([adapter.router(module) for adapter in self.layout.adapters]),
        }
        return {f"{KEY_PREFIX}{module}.{name}": tensor for name, tensor in tensors.items()}


def check_method(row: Method, kind: Kind, rank: int | None) -> None:
    """Raises a ``UserError`` for a method that cannot merge adapters of a kind."""
    if kind == "splitlora" and (not row.exact or rank is not None):
        raise UserError(
            "Split-LoRA adapters can be merged by average or sum alone, without a rank: their routers are trained, so "
            "their updates are neither matrices nor linear in codes that stay as they are."
        )


def _worker(
    row: Method, layout: Layout, spec: MergeSpec, weights: list[float], statistics: Statistics | None
) -> _Worker:
    check_method(row, layout.kind, spec.rank)
    routed = layout.kind == "flylora" and (
        row.works_on == "codes" or (layout.is_shared and not row.common_basis and spec.rank is None)
    )
    if routed and spec.rank is not None:
        raise UserError(
            f"rank cannot limit what {row.name} makes of FlyLoRA adapters, which keeps every input's routing: leave "
            "it out, or choose a method that makes a plain LoRA (e.g. ties)."
        )
    split = layout.kind == "splitlora"
    report = MergeReport(weights=weights, routed=routed or split, shared=layout.is_shared)
    kind = _RoutedWorker if routed else _SplitLoraWorker if split else _LoraWorker
    return kind(row, layout, spec, weights, statistics, report)


# --- configs ---------------------------------------------------------------------------------------------------


def _set_common(config: PeftConfig, layout: Layout, base_model: str | None) -> None:
    """Base model and targets of the merged adapter."""
    names = [adapter.base_model for adapter in layout.adapters if adapter.base_model]
    config.base_model_name_or_path = base_model or (names[0] if names else None)
    config.inference_mode = True
    configs = [adapter.config for adapter in layout.adapters]
    specs = [_target_spec(item) for item in configs]
    if all(spec == specs[0] for spec in specs[1:]):
        source = configs[0]
        for name in _TARGET_FIELDS:
            setattr(config, name, copy.copy(getattr(source, name)))
        return
    plain = all(spec[1:] == (None,) * (len(_TARGET_FIELDS) - 1) and isinstance(spec[0], frozenset) for spec in specs)
    targets = set().union(*(spec[0] for spec in specs)) if plain else set(layout.modules)
    for name in _TARGET_FIELDS:
        setattr(config, name, None)
    config.target_modules = targets


_TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _target_spec(config: PeftConfig) -> tuple[Any, ...]:
    values = []
    for name in _TARGET_FIELDS:
        value = getattr(config, name)
        values.append(frozenset(value) if isinstance(value, (set, list, tuple)) else value)
    return tuple(None if value in (frozenset(), "") else value for value in values)
