"""Saved adapters: read, check and write the folders of FlyLoRA and plain PEFT LoRA adapters.

Nothing here builds a model, and a tensor is read only when it is asked for, so that a merge reads one module at a time.

Legend: m, n are out_features and in_features of a module, r the rank axis over all T blocks of an adapter. The
adapter's update is ``s z B^T`` with B (m, r), the scaling s, and z (N, r) the routed codes of y = x A^T; see
`flylora.functional`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flylora import functional
from flylora.errors import UserError
from flylora.functional import Block
from flylora.projection import Identity, NonZeros, Projection, projection_of_file, stack_blocks
from flylora.records import TRAIN_RECORD, adapter_fingerprint, new_folder
from flylora.tuner.config import BlockConfig, FlyLoraConfig, pattern_value

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

SHORT_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Base models that flylora knows by a short name, and their names on the hub."""


def full_base_name(name: str) -> str:
    """The hub name of a base model that may be given by its short name; a local folder of that name stays as it is."""
    return name if Path(name).is_dir() else SHORT_NAMES.get(name, name)


# --- one module ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleFactors:
    """One adapter's factors in one module.

    Attributes:
        name: the module's full name in the base model.
        up: B, (m, r), in the dtype of the file; on the meta device where only the rest was read.
        scaling: s, which multiplies the update.
        blocks: how the rank axis is divided and routed; empty for a LoRA, which is linear.
        identity: each block's seed and the fingerprint of its A.
        steps: the routing bias as int32 counts of ``balance_rate``, (r,); all 0 for a LoRA.
        stored: A where the file holds it: (r, n) of a LoRA, or the non-zeros that ``save_projection`` keeps.
        in_features: n; None for a FlyLoRA adapter whose config does not state it.
    """

    name: str
    up: Tensor
    scaling: float
    blocks: tuple[BlockConfig, ...]
    identity: Identity
    steps: Tensor
    stored: Tensor | NonZeros | None = field(default=None, repr=False)
    in_features: int | None = None

    @property
    def out_features(self) -> int:
        return int(self.up.shape[0])

    @property
    def rank(self) -> int:
        """r over all blocks."""
        return int(self.up.shape[1])

    @property
    def routing(self) -> tuple[Block, ...]:
        """The routing as `flylora.functional` takes it; one linear block for a LoRA."""
        if not self.blocks:
            return (Block(self.rank, self.rank, "all"),)
        return tuple(block.routing(seed) for block, seed in zip(self.blocks, self.identity.seeds, strict=True))

    @property
    def is_linear(self) -> bool:
        """Whether every rank acts on every token, so that the update is the product s B A."""
        return all(block.is_linear for block in self.routing)

    @property
    def block_starts(self) -> tuple[int, ...]:
        """Where each block's columns start, and r at the end."""
        starts = [0]
        for block in self.routing:
            starts.append(starts[-1] + block.r)
        return tuple(starts)

    @property
    def routing_bias(self) -> Tensor:
        """d = balance_rate x steps, (r,) float32, in the units of the scores."""
        if not self.blocks:
            return torch.zeros(self.rank)
        ranks, rates = [block.r for block in self.blocks], [block.balance_rate for block in self.blocks]
        return functional.routing_bias(self.steps, ranks, rates)

    def scaled_up(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B, (m, r)."""
        return self.up.to(dtype) * self.scaling

    def projections(self) -> tuple[Projection, ...]:
        """Each block's A: stored, or drawn from its seed, and checked against the fingerprints.

        Raises:
            UserError: A is not the one that the fingerprint says, or n is not known.
        """
        if self.in_features is None:
            raise UserError(
                f"The adapter does not state the number of inputs of {self.name}, because an old version wrote it: "
                "give the base model, which has it."
            )
        stored = self.stored if isinstance(self.stored, NonZeros) else None
        return projection_of_file(self.name, self.identity, self.blocks, self.in_features, stored)

    def down(self) -> Tensor:
        """A over all blocks, (r, n) float32; raises like [`projections`]."""
        return self.stored.float() if isinstance(self.stored, Tensor) else stack_blocks(self.projections())

    def delta(self) -> Tensor:
        """s B A, (m, n) float32: the update itself for a linear adapter, that of k = r for a routed one."""
        return self.scaled_up() @ self.down()

    def encoder(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """A function from inputs x (N, n) to projections y = x A^T and routed codes z, both (N, r)."""
        down, bias, routing, linear = self.down(), self.routing_bias, self.routing, self.is_linear

        def encode(x: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal down, bias
            down, bias = down.to(x.device), bias.to(x.device)
            y = functional.project(x, down)
            return y, y if linear else functional.routed_codes(y, functional.select(y, bias, routing))

        return encode


# --- kinds of adapters -----------------------------------------------------------------------------------------


def _accept(path: Path, config: Any) -> None:
    """Every variant of the config is plain."""


@dataclass(frozen=True)
class Kind:
    """A kind of adapter that can be read.

    Attributes:
        name: PEFT's type in lower case. title: what users call it. config: the class of its config.
        up, down: names of the tensors B and A; down is None where the file need not hold A.
        tensors: what a file must hold in each module, with a letter of safetensors' dtype: F, I or U.
        optional: what it may hold besides; names in one pair come together.
        shapes: from config and module to the sizes that the config fixes, for some tensors; None is any size.
        scaling: s, from config, module and the module's rank.
        check: raises a ``UserError`` for a variant that is more than its factors.
    """

    name: str
    title: str
    config: type[PeftConfig]
    up: str
    down: str | None
    tensors: Mapping[str, str]
    shapes: Callable[[Any, str], dict[str, tuple[int | None, ...]]]
    scaling: Callable[[Any, str, int], float]
    optional: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Path, Any], None] = _accept


def _flylora_shapes(config: FlyLoraConfig, module: str) -> dict[str, tuple[int | None, ...]]:
    blocks = config.blocks_at(module)
    ranks = sum(block.r for block in blocks)
    return {
        "flylora_B": (None, ranks),
        "flylora_d": (ranks,),
        "flylora_seed": (len(blocks),),
        "flylora_fingerprint": (len(blocks), 32),
        "flylora_A_values": (ranks, None),
        "flylora_A_columns": (ranks, None),
    }


def _lora_shapes(config: LoraConfig, module: str) -> dict[str, tuple[int | None, ...]]:
    rank = pattern_value(config.rank_pattern or {}, module, config.r)
    return {"lora_A.weight": (rank, None), "lora_B.weight": (None, rank)}


def _lora_scaling(config: LoraConfig, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with ``use_rslora``."""
    alpha = pattern_value(config.alpha_pattern or {}, module, config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


_UNSUPPORTED_LORA = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# Initialisations of PEFT's LoRA that change the base weights, so that B A alone is not the whole update.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _check_lora(path: Path, config: LoraConfig) -> None:
    for name in _UNSUPPORTED_LORA:
        if getattr(config, name, None):
            raise UserError(
                f"{path} is a LoRA with {name} set, whose update is not the product of two factors: only plain LoRA "
                "(with or without rsLoRA scaling) can be merged."
            )
    if config.bias != "none":
        raise UserError(
            f"{path} is a LoRA that also trained biases (bias='{config.bias}'), which factors cannot hold: train it "
            "with bias='none' to merge it."
        )
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
        raise UserError(
            f"{path} is a LoRA initialised by {init}, which also changed the base weights: save it with PEFT's "
            "path_initial_model_for_weight_conversion first, which turns it into a plain LoRA."
        )


FLYLORA = Kind(
    name="flylora",
    title="FlyLoRA",
    config=FlyLoraConfig,
    up="flylora_B",
    down=None,
    tensors={"flylora_B": "F", "flylora_d": "I", "flylora_seed": "I", "flylora_fingerprint": "U"},
    shapes=_flylora_shapes,
    scaling=lambda config, module, rank: float(config.scaling_at(module)),
    optional={"flylora_A_values": "F", "flylora_A_columns": "I", "flylora_steps": "I"},
)
LORA = Kind(
    name="lora",
    title="LoRA",
    config=LoraConfig,
    up="lora_B.weight",
    down="lora_A.weight",
    tensors={"lora_A.weight": "F", "lora_B.weight": "F"},
    shapes=_lora_shapes,
    scaling=_lora_scaling,
    check=_check_lora,
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in (FLYLORA, LORA)}
"""Every kind that can be read, by name; a baseline of the laboratory adds its own."""


# --- one adapter -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder: its config, the shapes of its tensors, and its modules on demand.

    Attributes:
        path: the folder. kind: see [`KINDS`]. config: its PEFT config.
        shapes: for each module, in the order of the layers, the shape of each of its tensors by name.
        given_in_features: n of modules where somebody looked it up in the base model.
    """

    path: Path
    kind: Kind
    config: Any
    shapes: dict[str, dict[str, tuple[int, ...]]] = field(repr=False)
    given_in_features: Mapping[str, int] = field(default_factory=dict, repr=False)

    @property
    def base_model(self) -> str | None:
        """Name or path of the base model that the adapter was trained on; its hub name where it has one."""
        name = self.config.base_model_name_or_path
        return full_base_name(name) if name else None

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the adapted modules, in the order of their layers."""
        return tuple(self.shapes)

    @property
    def stores_projection(self) -> bool:
        """Whether the file holds A rather than the seeds alone."""
        return self.kind.down is not None or any("flylora_A_values" in tensors for tensors in self.shapes.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the tensors, as every record of flylora has it."""
        return adapter_fingerprint(self.path)

    @cached_property
    def _file(self) -> Any:
        # Kept open: the header of a large adapter takes longer to parse than a module takes to merge.
        return safe_open(str(self.path / WEIGHTS_FILE), framework="pt")

    def close(self) -> None:
        """Let go of the file until it is read again: while it is open, all that was read of it counts as memory."""
        self.__dict__.pop("_file", None)

    def out_features(self, module: str) -> int:
        """m of a module."""
        return self.shapes[module][self.kind.up][0]

    def rank(self, module: str) -> int:
        """r of a module, over all blocks."""
        return self.shapes[module][self.kind.up][1]

    def blocks(self, module: str) -> tuple[BlockConfig, ...]:
        """The blocks of a module; empty for an adapter that is not FlyLoRA."""
        return tuple(self.config.blocks_at(module)) if isinstance(self.config, FlyLoraConfig) else ()

    def scaling(self, module: str) -> float:
        """s of a module."""
        return self.kind.scaling(self.config, module, self.rank(module))

    def in_features(self, module: str) -> int | None:
        """n of a module; None where an old FlyLoRA config does not state it."""
        if self.kind.down is not None:
            return self.shapes[module][self.kind.down][1]
        stated: int | None = self.config.in_features_at(module)
        return self.given_in_features.get(module) if stated is None else stated

    def with_in_features(self, widths: Mapping[str, int]) -> SavedAdapter:
        """This adapter with n of its modules taken from the base model, for those whose n the config does not state."""
        return replace(self, given_in_features=dict(widths))

    def factors(self, module: str, in_features: int | None = None) -> ModuleFactors:
        """The factors of one module, read now.

        Args:
            in_features: n, where the base model is at hand; else what the adapter states.

        Raises:
            UserError: the file cannot be read.
        """
        return self._assemble(module, self.read(module, self.shapes[module]), in_features)

    def small(self, module: str) -> ModuleFactors:
        """The factors of one module without large tensors: B, and A of a LoRA, are empty ones on the meta device."""
        large = self.shapes[module].keys() & {self.kind.up, self.kind.down}
        tensors = self.read(module, [name for name in self.shapes[module] if name not in large])
        for name in large:
            tensors[name] = torch.empty(self.shapes[module][name], device="meta")
        return self._assemble(module, tensors, None)

    def read(self, module: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of one module by name.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            return {name: self._file.get_tensor(f"{KEY_PREFIX}{module}.{name}") for name in names}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path / WEIGHTS_FILE} cannot be read ({error}): get the adapter again.") from error

    def _assemble(self, module: str, tensors: Mapping[str, Tensor], in_features: int | None) -> ModuleFactors:
        up, n = tensors[self.kind.up], in_features or self.in_features(module)
        if self.kind.down is not None:
            steps, stored = torch.zeros(up.shape[1], dtype=torch.int32), tensors[self.kind.down]
            return ModuleFactors(module, up, self.scaling(module), (), Identity((), ()), steps, stored, n)
        nonzeros = None
        if "flylora_A_values" in tensors:
            nonzeros = NonZeros(tensors["flylora_A_values"], tensors["flylora_A_columns"])
        identity = Identity.from_tensors(tensors["flylora_seed"], tensors["flylora_fingerprint"])
        blocks, steps = self.blocks(module), tensors["flylora_d"]
        return ModuleFactors(module, up, self.scaling(module), blocks, identity, steps, nonzeros, n)


# --- reading ---------------------------------------------------------------------------------------------------


def read_adapter(path: str | Path, kinds: Collection[str] = ("flylora", "lora")) -> SavedAdapter:
    """Open an adapter folder that flylora or PEFT (LoRA) wrote; tensors are read later, module by module.

    Args:
        path: the folder. kinds: names of the kinds it may be, see [`KINDS`].

    Raises:
        UserError: the folder, its config or its file is missing, damaged, inconsistent, or of a kind that is not B A.
    """
    path = Path(path)
    config, kind = _read_config(path, [KINDS[name] for name in kinds])
    kind.check(path, config)
    if config.modules_to_save:
        raise UserError(
            f"{path} also holds fully trained modules ({', '.join(sorted(config.modules_to_save))}), which are no "
            "low-rank update: train the adapters without modules_to_save to merge or export them."
        )
    adapter = SavedAdapter(path, kind, config, _read_header(path, kind))
    for module in adapter.modules:
        _check_module(adapter, module)
    return adapter


def read_config(path: Path) -> dict[str, Any]:
    """The config of any PEFT adapter, as its JSON has it.

    Raises:
        UserError: the folder or its config is missing or damaged.
    """
    file = path / CONFIG_FILE
    if not path.is_dir():
        raise UserError(
            f"There is no adapter folder {path}: give the folder that training or PEFT's save_pretrained wrote."
        )
    if not file.is_file():
        if (path / TRAIN_RECORD).is_file():
            raise UserError(f"The training run in {path} is not finished: go on with flylora train --resume.")
        raise UserError(f"{path} holds no {CONFIG_FILE}, so it is not a saved adapter: give the folder that holds one.")
    try:
        body: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "peft_type" in body:
            return body
        reason = "it names no peft_type"
    except (OSError, ValueError, TypeError) as error:
        reason = f"it is not valid JSON: {error}"
    raise UserError(f"{file} is not a readable adapter config ({reason}): get the adapter again.")


def _read_config(path: Path, kinds: Sequence[Kind]) -> tuple[Any, Kind]:
    file, body = path / CONFIG_FILE, read_config(path)
    peft_type = body["peft_type"]
    kind = next((kind for kind in kinds if kind.name == str(peft_type).lower()), None)
    if kind is None:
        *others, last = (kind.title for kind in kinds)
        raise UserError(
            f"{path} is a {peft_type} adapter, but only {', '.join(others)} and {last} adapters can be used here."
        )
    try:
        config = PeftConfig.from_peft_type(**body)
    except UserError as error:
        raise UserError(f"{file} does not describe a usable adapter: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} does not describe a usable adapter ({error}): get the original.") from error
    assert isinstance(config, kind.config)
    return config, kind


def _read_header(path: Path, kind: Kind) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of all tensors by module and name; their dtypes are checked."""
    file = path / WEIGHTS_FILE
    if not file.is_file():
        pickled = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (path / name).exists()), None)
        reason = f"only the pickled {pickled}, which is never opened" if pickled else "no weights"
        raise UserError(f"{path} holds {reason}: give an adapter saved as {WEIGHTS_FILE}.")
    try:
        with safe_open(str(file), framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
            header = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or cut off ({error}): get the adapter again.") from error
    known = {**kind.tensors, **kind.optional}
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, (dtype, shape) in header.items():
        tensor = next((name for name in known if key.endswith(f".{name}")), None)
        if tensor is None or not key.startswith(KEY_PREFIX):
            raise UserError(
                f"{file} holds the tensor '{key}', which is no factor of a {kind.title} on a "
                "linear layer: adapters on other layers or with further trained parts cannot be merged or exported."
            )
        if known[tensor] not in dtype:
            raise UserError(f"The tensor '{key}' in {file} has the wrong type {dtype}: get the original adapter.")
        modules.setdefault(key.removeprefix(KEY_PREFIX).removesuffix(f".{tensor}"), {})[tensor] = shape
    if not modules:
        raise UserError(f"{file} holds no adapted module: the adapter is empty, so save it again.")
    return {name: modules[name] for name in sorted(modules, key=_natural_order)}


def _natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Numbers by value, so that layer 10 comes after layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _check_module(adapter: SavedAdapter, module: str) -> None:
    """All tensors are there, with shapes that fit the config."""
    shapes = adapter.shapes[module]
    missing = [name for name in adapter.kind.tensors if name not in shapes]
    if ("flylora_A_values" in shapes) != ("flylora_A_columns" in shapes):
        missing.append("flylora_A_values or flylora_A_columns")
    if missing:
        raise UserError(
            f"{adapter.path} lacks {' and '.join(missing)} of {module}: the file is incomplete; get it again."
        )
    for name, wanted in adapter.kind.shapes(adapter.config, module).items():
        shape = shapes.get(name, wanted)
        if len(shape) != len(wanted):
            raise UserError(
                f"{module} in {adapter.path} is not a linear layer: only adapters on linear layers can be merged or "
                "exported."
            )
        if any(size not in (given, None) for given, size in zip(shape, wanted, strict=True)):
            asked = " x ".join("any" if size is None else str(size) for size in wanted)
            raise UserError(
                f"{name} of {module} in {adapter.path} has shape {' x '.join(map(str, shape))}, but the config asks "
                f"for {asked}: config and weights do not belong together; get the original."
            )


# --- writing ---------------------------------------------------------------------------------------------------


def save_adapter(folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a folder.

    Sets in the config are sorted, so that equal adapters give equal files.

    Args:
        folder: an existing folder. config: of the adapter.
        tensors: by their keys, ``base_model.model.<module>.<tensor>``.
    """
    body = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    text = json.dumps(body, indent=2, sort_keys=True, default=str) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(whole, folder / WEIGHTS_FILE, {"format": "pt"})


def write_adapter(
    path: str | Path, config: PeftConfig, tensors: Mapping[str, Tensor], overwrite: bool = False
) -> SavedAdapter:
    """Write an adapter folder and open it; it appears under its name only when all is written.

    Args:
        path: the folder. config: its config. tensors: see [`save_adapter`].
        overwrite: replace an adapter that is already there.

    Raises:
        UserError: the output exists, or cannot be written.
    """
    with new_folder(path, overwrite) as folder:
        save_adapter(folder, config, tensors)
    return read_adapter(path)
