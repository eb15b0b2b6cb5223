"""The rank axis of a merged adapter: which blocks stand where, and which input each of them comes from.

Every input keeps its own projection and routing as a block, so that the merged adapter's codes z are those of the
inputs side by side, and each input t is reproduced by a B_t' that is its own s_t B_t in its blocks' columns and zero
elsewhere.
Blocks with the same projection and routing are one block; then two inputs' columns coincide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig
from torch import Tensor

from flylora import functional, projection
from flylora.adapter_folder import KIND_NAMES, Kind, ModuleFactors, SavedAdapter
from flylora.errors import UserError
from flylora.functional import Block
from flylora.lab.baselines.split_lora import SplitLoraConfig
from flylora.projection import NonZeros as SparseProjection
from flylora.tuner.config import BlockConfig, FlyLoraConfig
from flylora.tuner.layer import generate_block

Source = tuple[int, int]
"""An input by its position, and one of its blocks by its position (0 for a LoRA)."""


@dataclass(frozen=True)
class Slot:
    """One block of the merged adapter and the inputs' blocks that share it; ``block`` is None for a LoRA."""

    block: BlockConfig | None
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Place:
    """Where a part of an input's B goes: its columns ``start:stop`` to columns ``target`` and following."""

    adapter: int
    start: int
    stop: int
    target: int


@dataclass(frozen=True)
class ModuleLayout:
    """The merged adapter in one module.

    Attributes:
        name: the module. out_features: m. rank: R, all blocks together.
        slots: the slots that are present here (for a LoRA) or all (for FlyLoRA, absent ones with one rank and zero B).
        ranks: r of each of them.
        places: where each input's columns go.
        factors: the inputs' factors without B, by position; inputs that do not adapt this module are left out.
    """

    name: str
    out_features: int
    rank: int
    slots: tuple[Slot, ...]
    ranks: tuple[int, ...]
    places: tuple[Place, ...]
    factors: dict[int, ModuleFactors] = field(repr=False)

    def place(self, adapter: int, scaled_up: Tensor) -> Tensor:
        """B_t' (m, R): the input's s_t B_t (m, r) in its columns, zero elsewhere."""
        out = scaled_up.new_zeros(self.out_features, self.rank)
        for place in self.places:
            if place.adapter == adapter:
                width = place.stop - place.start
                out[:, place.target : place.target + width] += scaled_up[:, place.start : place.stop]
        return out

    @property
    def is_shared(self) -> bool:
        """Whether all inputs stand in the same columns, so that B alone tells them apart."""
        return len(self.slots) == 1 and {source[0] for source in self.slots[0].sources} == set(self.factors)


@dataclass(frozen=True)
class Layout:
    """How the inputs share the rank axis, over all modules."""

    adapters: tuple[SavedAdapter, ...]
    kind: Kind
    slots: tuple[Slot, ...]
    modules: tuple[str, ...]

    @property
    def is_shared(self) -> bool:
        """Whether all inputs share one projection and its routing."""
        return len(self.slots) == 1 and len(self.slots[0].sources) == len(self.adapters)

    def holders(self, module: str) -> list[int]:
        """Positions of the inputs that adapt a module."""
        return [t for t, adapter in enumerate(self.adapters) if module in adapter.shapes]

    def in_features(self, module: str, hint: int | None = None) -> int:
        """n of a module.

        Raises:
            UserError: no file tells it and there is no hint.
        """
        for t in self.holders(module):
            found = self.adapters[t].in_features(module, hint)
            if found is not None:
                return found
        raise UserError(
            f"The number of inputs of {module} cannot be told from the adapter files (their projections fit none of "
            "the widths in them): they were altered, or belong to a model that has to be named with base_model."
        )

    def known_in_features(self) -> dict[str, int]:
        """n of the modules whose n the inputs' configs hold."""
        known = {}
        for module in self.modules:
            for t in self.holders(module):
                config = self.adapters[t].config
                n = config.in_features_at(module) if isinstance(config, FlyLoraConfig) else None
                if n is not None:
                    known[module] = n
        return known

    def at(self, module: str) -> ModuleLayout:
        """The layout in one module; reads what identifies the projections, not B."""
        factors = {t: self.adapters[t].small(module) for t in self.holders(module)}
        slots, ranks, places, target = [], [], [], 0
        for slot in self.slots:
            present = [source for source in slot.sources if source[0] in factors]
            if not present and self.kind != "flylora":
                continue
            rank = 1
            for t, j in present:
                bounds = _block_bounds(factors[t])
                rank = bounds[j + 1] - bounds[j]
                places.append(Place(t, bounds[j], bounds[j + 1], target))
            slots.append(slot)
            ranks.append(rank)
            target += rank
        out_features = self.adapters[next(iter(factors))].out_features(module)
        return ModuleLayout(module, out_features, target, tuple(slots), tuple(ranks), tuple(places), factors)

    def config_blocks(self) -> list[BlockConfig]:
        """The slots as a merged FlyLoRA config holds them: a slot has one idle rank where its inputs are absent."""
        blocks = []
        for slot in self.slots:
            assert slot.block is not None
            holders = {module for t, _ in slot.sources for module in self.adapters[t].modules}
            absent = {module: 1 for module in self.modules if module not in holders}
            blocks.append(replace(slot.block, rank_pattern={**absent, **slot.block.rank_pattern}))
        return blocks


@dataclass
class Codes:
    """What turns a module's input into the merged adapter's routed codes.

    Attributes:
        down: A over all slots, (R, n) float32. routing_bias: d, (R,) float32. routing: how R is divided and routed.
    """

    down: Tensor
    routing_bias: Tensor
    routing: tuple[Block, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """z (N, R) of the tokens x (N, n)."""
        y = functional.project(x, self.down)
        if all(block.is_linear for block in self.routing):
            return y
        return functional.routed_codes(y, functional.select(y, self.routing_bias, self.routing))

    def to(self, device: torch.device) -> None:
        """Move to where the inputs are."""
        if self.down.device != device:
            self.down, self.routing_bias = self.down.to(device), self.routing_bias.to(device)


@dataclass(frozen=True)
class MergedIdentity:
    """What identifies the merged A in one module, as the adapter file holds it.

    Attributes:
        blocks: as they are in this module. seeds, fingerprints: of each.
        steps: the routing bias in steps, (R,) int32.
        stored: A's non-zeros where the seeds do not give it back.
    """

    blocks: tuple[BlockConfig, ...]
    seeds: tuple[int, ...]
    fingerprints: tuple[bytes, ...]
    steps: Tensor
    stored: SparseProjection | None


def plan(adapters: Sequence[SavedAdapter], share: bool = True) -> Layout:
    """Work out the rank axis of a merge; reads no B.

    Args:
        adapters: the inputs, all of one kind, see [`check_compatible`].
        share: make one block of equal ones.
    """
    kind = adapters[0].kind
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.modules))
    if kind != "flylora":
        slots = [Slot(None, ((t, 0),)) for t in range(len(adapters))]
        return Layout(tuple(adapters), kind, tuple(slots), tuple(modules))
    groups: list[tuple[BlockConfig, list[Source]]] = []
    for t, adapter in enumerate(adapters):
        assert isinstance(adapter.config, FlyLoraConfig)
        for j, block in enumerate(adapter.config.block_configs()):
            group = next((g for g in groups if share and _same_projection(adapters, g, block, (t, j))), None)
            if group is None:
                groups.append((block, [(t, j)]))
            else:
                group[1].append((t, j))
    slots = []
    for block, sources in groups:
        rates = [_block_config(adapters, source).balance_rate for source in sources]
        rate = min((rate for rate in rates if rate > 0), default=block.balance_rate)
        slots.append(Slot(replace(block, balance_rate=rate), tuple(sources)))
    return Layout(tuple(adapters), kind, tuple(slots), tuple(modules))


def _block_config(adapters: Sequence[SavedAdapter], source: Source) -> BlockConfig:
    config = adapters[source[0]].config
    assert isinstance(config, FlyLoraConfig)
    return config.block_configs()[source[1]]


def _same_projection(
    adapters: Sequence[SavedAdapter], group: tuple[BlockConfig, list[Source]], block: BlockConfig, source: Source
) -> bool:
    """Equal routing in the configs, and equal projections in the files of every module that both adapt."""
    first, members = group
    if replace(first, balance_rate=0.0) != replace(block, balance_rate=0.0):
        return False
    t, j = source
    for other, i in members:
        if other == t:
            return False  # two blocks of one adapter are two terms of its sum
        for module in set(adapters[other].modules) & set(adapters[t].modules):
            a, b = adapters[other].small(module), adapters[t].small(module)
            if (a.seeds[i], a.fingerprints[i], a.blocks[i].r) != (b.seeds[j], b.fingerprints[j], b.blocks[j].r):
                return False
    return True


def _block_bounds(factors: ModuleFactors) -> list[int]:
    ranks = [block.r for block in factors.blocks] or [factors.rank]
    bounds = [0]
    for rank in ranks:
        bounds.append(bounds[-1] + rank)
    return bounds


def merged_identity(layout: Layout, local: ModuleLayout, hint: int | None = None) -> MergedIdentity:
    """Seeds, fingerprints and routing bias of a merged FlyLoRA adapter in one module.

    The routing bias of a slot that several inputs share is the mean of theirs, rounded to whole steps: it depends on
    neither the order of the inputs nor their weights.
    """
    blocks, seeds, fingerprints, steps, stored = [], [], [], [], False
    for slot, rank in zip(local.slots, local.ranks, strict=True):
        assert slot.block is not None
        block = replace(slot.block, r=rank)
        present = [(local.factors[t], j) for t, j in slot.sources if t in local.factors]
        if present:
            factors, j = present[0]
            seeds.append(factors.seeds[j])
            fingerprints.append(factors.fingerprints[j])
            # One density stands for all modules of a merged block, so an A made with another one has to be kept.
            stored |= isinstance(factors.stored, SparseProjection) or factors.blocks[j].density != block.density
            steps.append(_mean_steps(present, block.balance_rate))
        else:
            n = layout.in_features(local.name, hint)
            seeds.append(projection.derive_seed(block.projection_seed, local.name))
            fingerprints.append(projection.fingerprint(generate_block(seeds[-1], block, n), n))
            steps.append(torch.zeros(rank, dtype=torch.int32))
        blocks.append(block)
    kept = None
    if stored:
        kept = projection.sparsify(merged_down(layout, local, hint))
    return MergedIdentity(tuple(blocks), tuple(seeds), tuple(fingerprints), torch.cat(steps), kept)


def _mean_steps(present: Sequence[tuple[ModuleFactors, int]], rate: float) -> Tensor:
    parts = []
    for factors, j in present:
        bounds = _block_bounds(factors)
        ratio = factors.blocks[j].balance_rate / rate if rate else 1.0
        parts.append(factors.steps[bounds[j] : bounds[j + 1]].double() * ratio)
    return torch.stack(parts).mean(dim=0).round().to(torch.int32)


def merged_down(layout: Layout, local: ModuleLayout, hint: int | None = None) -> Tensor:
    """A over all slots of one module, (R, n) float32, each block checked against its fingerprint."""
    n = layout.in_features(local.name, hint)
    parts = []
    for slot, rank in zip(local.slots, local.ranks, strict=True):
        present = [(local.factors[t], t, j) for t, j in slot.sources if t in local.factors]
        if not present:
            assert slot.block is not None
            seed = projection.derive_seed(slot.block.projection_seed, local.name)
            parts.append(projection.densify(generate_block(seed, replace(slot.block, r=rank), n), n))
            continue
        factors, t, j = present[0]
        if layout.kind != "flylora":
            parts.append(layout.adapters[t].factors(local.name).down())
        else:
            parts.append(projection.densify(factors.block_projections(n)[j], n))
    return torch.cat(parts)


def codes(layout: Layout, module: str, hint: int | None = None) -> Codes:
    """The function from a module's input to the merged adapter's routed codes."""
    local = layout.at(module)
    down = merged_down(layout, local, hint)
    if layout.kind == "lora":
        return Codes(down, torch.zeros(local.rank), (Block(local.rank, local.rank, "all"),))
    identity = merged_identity(layout, local, hint)
    routing = tuple(
        Block(block.r, block.k, block.selection, seed % (1 << 32))
        for block, seed in zip(identity.blocks, identity.seeds, strict=True)
    )
    rates = torch.cat([torch.full((block.r,), block.balance_rate) for block in identity.blocks])
    return Codes(down, identity.steps.float() * rates, routing)


def check_compatible(adapters: Sequence[SavedAdapter], base_model: str | None = None) -> None:
    """Refuse inputs that cannot become one adapter, naming what differs.

    Args:
        adapters: the inputs.
        base_model: the user's word for the base model of all of them; then their configs' names are not compared.

    Raises:
        UserError: different kinds of adapter, base models or shapes.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if other.kind != first.kind:
            raise UserError(
                f"{first.path} is a {KIND_NAMES[first.kind]} and {other.path} a {KIND_NAMES[other.kind]} adapter: "
                "they do not route alike, so merge each kind on its own, or export the FlyLoRA adapters first."
            )
        if base_model is None and first.base_model != other.base_model and first.base_model and other.base_model:
            raise UserError(
                f"{first.path} was trained on {first.base_model} and {other.path} on {other.base_model}: adapters of "
                "different base models cannot be merged; if both name one model, give its name as base_model."
            )
        if _orientation(first) != _orientation(other):
            raise UserError(
                f"{first.path} and {other.path} differ in fan_in_fan_out, so they belong to layers of different "
                "kinds: only adapters of one base model can be merged."
            )
        for module in first.modules:
            if module in other.shapes:
                _check_shapes(first, other, module)
        _check_experts(first, other)


def _check_shapes(first: SavedAdapter, other: SavedAdapter, module: str) -> None:
    a: list[int | None] = [first.out_features(module)]
    b: list[int | None] = [other.out_features(module)]
    if first.kind != "flylora":
        a.append(first.in_features(module))
        b.append(other.in_features(module))
    if a != b:
        raise UserError(
            f"{module} has {_sizes(a)} in {first.path} and {_sizes(b)} in {other.path}: the adapters belong to "
            "different base models and cannot be merged."
        )


def _check_experts(first: SavedAdapter, other: SavedAdapter) -> None:
    """One config says how all experts of a merged Split-LoRA adapter are routed, in all modules."""
    a, b = first.config, other.config
    if not isinstance(a, SplitLoraConfig) or not isinstance(b, SplitLoraConfig):
        return
    shapes = [(c.r // c.experts, c.group_size, c.active_in_group) for c in (a, b)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{first.path} and {other.path} have Split-LoRA experts of different rank, number or k: only alike ones "
            "can be merged."
        )
    if set(first.modules) != set(other.modules):
        raise UserError(
            f"{first.path} and {other.path} adapt different modules, which Split-LoRA adapters cannot be merged from: "
            "train them with the same target_modules."
        )


def _sizes(sizes: Sequence[int | None]) -> str:
    return " and ".join(f"{size} {side}" for size, side in zip(sizes, ("outputs", "inputs"), strict=False))


def _orientation(adapter: SavedAdapter) -> bool:
    return isinstance(adapter.config, LoraConfig) and bool(adapter.config.fan_in_fan_out)
