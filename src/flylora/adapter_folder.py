"""Saved adapters as factors: reading FlyLoRA and plain PEFT LoRA folders module by module, and writing new ones.

Nothing here builds a model, and nothing is read before it is asked for, so that a merge holds one module at a time.

Legend: m, n are out_features and in_features of a module, r the rank axis over all T blocks of an adapter. The
adapter's update is ``s z B^T`` with B (m, r), the scaling s, and z (N, r) the routed codes of y = x A^T; see
`flylora.functional`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flylora import projection
from flylora.errors import UserError
from flylora.functional import Block
from flylora.lab.baselines.split_lora import SplitLoraConfig
from flylora.projection import NonZeros as SparseProjection
from flylora.records import adapter_fingerprint, new_folder
from flylora.tuner.config import BlockConfig, FlyLoraConfig, pattern_value
from flylora.tuner.layer import generate_block

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

SHORT_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Base models that flylora knows by a short name, and their names on the hub."""

Kind = Literal["flylora", "lora", "splitlora"]

KIND_NAMES: dict[Kind, str] = {"flylora": "FlyLoRA", "lora": "LoRA", "splitlora": "Split-LoRA"}

_UP: dict[Kind, str] = {"flylora": "flylora_B", "lora": "lora_B.weight", "splitlora": "splitlora_B"}
_DOWN: dict[Kind, str] = {"lora": "lora_A.weight", "splitlora": "splitlora_A"}
_REQUIRED: dict[Kind, tuple[str, ...]] = {
    "flylora": ("flylora_B", "flylora_d", "flylora_seed", "flylora_fingerprint"),
    "lora": ("lora_A.weight", "lora_B.weight"),
    "splitlora": ("splitlora_A", "splitlora_B", "splitlora_router"),
}
_OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "flylora": ("flylora_A_values", "flylora_A_columns", "flylora_steps"),
    "lora": (),
    "splitlora": (),
}

# Initialisations of PEFT's LoRA that change the base weights, so that B A alone is not the whole update.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
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

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def full_base_name(name: str) -> str:
    """The hub name of a base model that may be given by its short name; a local folder of that name stays as it is."""
    return name if Path(name).is_dir() else SHORT_NAMES.get(name, name)


# --- one module ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleFactors:
    """One adapter's factors in one module.

    Attributes:
        name: the module's full name in the base model.
        up: B, (m, r), in the dtype of the file.
        scaling: s, which multiplies the update.
        blocks: how the rank axis is divided and routed; empty for a LoRA, which is linear.
        seeds: what each block's A is generated from; fingerprints: sha256 of each block's A.
        steps: the routing bias as int32 counts of ``balance_rate``, (r,); all 0 for a LoRA.
        stored: A where the file holds it: (r, n) of a LoRA, or the non-zeros that ``save_projection`` keeps.
        in_features: n where it is known: of a LoRA always, of a FlyLoRA adapter once it was looked up.
    """

    name: str
    up: Tensor
    scaling: float
    blocks: tuple[BlockConfig, ...]
    seeds: tuple[int, ...]
    fingerprints: tuple[bytes, ...]
    steps: Tensor
    stored: Tensor | SparseProjection | None = field(default=None, repr=False)
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
        return tuple(
            Block(block.r, block.k, block.selection, seed % (1 << 32))
            for block, seed in zip(self.blocks, self.seeds, strict=True)
        )

    @property
    def is_linear(self) -> bool:
        """Whether every rank acts on every token, so that the update is the product s B A."""
        return all(block.is_linear for block in self.routing)

    @property
    def routing_bias(self) -> Tensor:
        """d = balance_rate x steps, (r,) float32, in the units of the scores."""
        if not self.blocks:
            return torch.zeros(self.rank)
        ranks = [block.r for block in self.blocks]
        parts = zip(self.steps.float().split(ranks), self.blocks, strict=True)
        return torch.cat([part * block.balance_rate for part, block in parts])

    def scaled_up(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B, (m, r)."""
        return self.up.to(dtype) * self.scaling

    def block_projections(self, in_features: int | None = None) -> list[SparseProjection]:
        """The non-zeros of each block's A: stored ones, or what the seeds give, checked against the fingerprints.

        Args:
            in_features: n; needed for a FlyLoRA adapter whose n was not looked up.

        Raises:
            UserError: A is not the one that the fingerprint says.
        """
        n = self._known_in_features(in_features)
        if isinstance(self.stored, SparseProjection):
            ranks = [block.r for block in self.blocks]
            _check_columns(self.name, self.stored, n)
            parts = [
                projection.sparsify(projection.densify(SparseProjection(values, columns), n))
                for values, columns in zip(
                    self.stored.values.split(ranks), self.stored.columns.split(ranks), strict=True
                )
            ]
        else:
            parts = [generate_block(seed, block, n) for seed, block in zip(self.seeds, self.blocks, strict=True)]
        if tuple(projection.fingerprint(part, n) for part in parts) != self.fingerprints:
            raise UserError(
                f"The projection of {self.name} that the stored seed gives for {n} inputs is not the one the adapter "
                "was trained with: the file or its config was altered, or it belongs to another base model; get the "
                "original."
            )
        return parts

    def down(self, in_features: int | None = None) -> Tensor:
        """A over all blocks, (r, n) float32, regenerated from the seeds where the file does not hold it.

        Raises:
            UserError: A is not the one that the fingerprint says, or n is not known.
        """
        if isinstance(self.stored, Tensor):
            return self.stored.float()
        n = self._known_in_features(in_features)
        return torch.cat([projection.densify(part, n) for part in self.block_projections(n)])

    def delta(self, in_features: int | None = None) -> Tensor:
        """s B A, (m, n) float32: the update itself for a linear adapter, that of k = r for a routed one."""
        return self.scaled_up() @ self.down(in_features)

    def _known_in_features(self, given: int | None) -> int:
        n = self.in_features if given is None else given
        if n is None:
            raise UserError(
                f"The number of inputs of {self.name} is not in the adapter file: give the base model, which tells it."
            )
        return n


def _check_columns(name: str, stored: SparseProjection, in_features: int) -> None:
    if int(stored.columns.min()) < 0 or int(stored.columns.max()) >= in_features:
        raise UserError(
            f"The stored projection of {name} names columns outside its {in_features} inputs: the adapter file is "
            "damaged or belongs to another base model."
        )


# --- one adapter -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder: its config, what its file holds by the header alone, and its modules on demand.

    Attributes:
        path: the folder. kind: ``flylora``, ``lora`` or ``splitlora``. config: its PEFT config.
        shapes: for each module, the shape of each of its tensors by the tensor's name.
    """

    path: Path
    kind: Kind
    config: FlyLoraConfig | LoraConfig | SplitLoraConfig
    shapes: dict[str, dict[str, tuple[int, ...]]] = field(repr=False)
    _in_features: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

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
        return self.kind in _DOWN or any("flylora_A_values" in tensors for tensors in self.shapes.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the tensors, as every record of flylora has it."""
        return adapter_fingerprint(self.path)

    @cached_property
    def _file(self) -> Any:
        # Kept open: the header of a large adapter takes longer to parse than a module takes to merge.
        return safe_open(str(self.path / WEIGHTS_FILE), framework="pt")

    def out_features(self, module: str) -> int:
        """m of a module."""
        return self.shapes[module][_UP[self.kind]][0]

    def rank(self, module: str) -> int:
        """r of a module, over all blocks."""
        return self.shapes[module][_UP[self.kind]][1]

    def blocks(self, module: str) -> tuple[BlockConfig, ...]:
        """The blocks of a module; empty for a LoRA."""
        return tuple(self.config.blocks_at(module)) if isinstance(self.config, FlyLoraConfig) else ()

    def scaling(self, module: str) -> float:
        """s of a module: alpha / r, or alpha / sqrt(r) with ``use_rslora``."""
        if isinstance(self.config, FlyLoraConfig):
            return self.config.scaling_at(module)
        if isinstance(self.config, SplitLoraConfig):
            return self.config.scaling
        rank = self.rank(module)
        alpha = pattern_value(self.config.alpha_pattern or {}, module, self.config.lora_alpha)
        return float(alpha / (rank**0.5 if self.config.use_rslora else rank))

    def in_features(self, module: str, hint: int | None = None) -> int | None:
        """n of a module, or ``None`` where neither file nor hint tells.

        A FlyLoRA file does not hold n. It is found as the out_features of some other adapted module (or the hint) for
        which the seed gives the fingerprint; a wrong guess cannot pass.
        """
        if self.kind in _DOWN:
            return self.shapes[module][_DOWN[self.kind]][1]
        if module not in self._in_features:
            factors = self.small(module)
            widths = sorted({self.out_features(other) for other in self.modules})
            # Layers repeat: what fitted a module of the same name is tried first.
            alike = [n for name, n in self._in_features.items() if name.rpartition(".")[2] == module.rpartition(".")[2]]
            known = self.config.in_features_at(module) if isinstance(self.config, FlyLoraConfig) else None
            hints = [n for n in (known, hint) if n]
            candidates = dict.fromkeys([*hints, *reversed(alike), *widths])
            for n in candidates:
                if self._fits(factors, n):
                    self._in_features[module] = n
                    break
        return self._in_features.get(module)

    def _fits(self, factors: ModuleFactors, in_features: int) -> bool:
        block = factors.blocks[0]
        if block.nonzeros(in_features) > in_features:
            return False
        if isinstance(factors.stored, SparseProjection):
            if int(factors.stored.columns.max()) >= in_features:
                return False
            first = SparseProjection(factors.stored.values[: block.r], factors.stored.columns[: block.r])
            part = projection.sparsify(projection.densify(first, in_features))
        else:
            part = generate_block(factors.seeds[0], block, in_features)
        return projection.fingerprint(part, in_features) == factors.fingerprints[0]

    def factors(self, module: str) -> ModuleFactors:
        """The factors of one module, read now.

        Raises:
            UserError: the file cannot be read.
        """
        required, optional = _REQUIRED[self.kind], _OPTIONAL[self.kind]
        present = [name for name in (*required, *optional) if name in self.shapes[module]]
        return self._assemble(module, self._read(module, present))

    def small(self, module: str) -> ModuleFactors:
        """The factors of one module without B (an empty B of the right shape on the meta device): what identifies A."""
        large = {_UP[self.kind], _DOWN.get(self.kind)}
        tensors = self._read(module, [name for name in self.shapes[module] if name not in large])
        for name in self.shapes[module].keys() & large:
            tensors[name] = torch.empty(self.shapes[module][name], device="meta")
        return self._assemble(module, tensors)

    def _read(self, module: str, names: Iterable[str]) -> dict[str, Tensor]:
        try:
            return {name: self._file.get_tensor(f"{KEY_PREFIX}{module}.{name}") for name in names}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path / WEIGHTS_FILE} cannot be read ({error}): get the adapter again.") from error

    def _assemble(self, module: str, tensors: Mapping[str, Tensor]) -> ModuleFactors:
        if self.kind in _DOWN:
            down, up = tensors[_DOWN[self.kind]], tensors[_UP[self.kind]]
            steps = torch.zeros(up.shape[1], dtype=torch.int32)
            n = int(down.shape[1])
            return ModuleFactors(module, up, self.scaling(module), (), (), (), steps, down, n)
        stored = None
        if "flylora_A_values" in tensors:
            stored = SparseProjection(tensors["flylora_A_values"], tensors["flylora_A_columns"])
        return ModuleFactors(
            module,
            tensors["flylora_B"],
            self.scaling(module),
            self.blocks(module),
            tuple(tensors["flylora_seed"].tolist()),
            tuple(bytes(row.tolist()) for row in tensors["flylora_fingerprint"]),
            tensors["flylora_d"],
            stored,
            self._in_features.get(module),
        )

    def router(self, module: str) -> Tensor:
        """W_g (N, n) of a Split-LoRA adapter in one module."""
        return self._read(module, ["splitlora_router"])["splitlora_router"]

    def with_in_features(self, factors: ModuleFactors, hint: int | None = None) -> ModuleFactors:
        """The factors with n looked up, where it can be."""
        return replace(factors, in_features=self.in_features(factors.name, hint))


def read_adapter(path: str | Path, kinds: Collection[Kind] = ("flylora", "lora")) -> SavedAdapter:
    """Open an adapter folder that flylora or PEFT (LoRA) wrote; tensors are read later, module by module.

    Args:
        path: the folder. kinds: what it may be.

    Raises:
        UserError: the folder, its config or its file is missing, damaged, inconsistent, or of a kind that is not B A.
    """
    path = Path(path)
    config = _read_config(path, kinds)
    kind = _kind_of(config)
    if isinstance(config, LoraConfig):
        _refuse_lora_variants(path, config)
    if config.modules_to_save:
        raise UserError(
            f"{path} also holds fully trained modules ({', '.join(sorted(config.modules_to_save))}), which are no "
            "low-rank update: train the adapters without modules_to_save to merge or export them."
        )
    adapter = SavedAdapter(path, kind, config, _read_header(path, kind))
    for module in adapter.modules:
        _check_module(adapter, module)
    return adapter


def _kind_of(config: PeftConfig) -> Kind:
    return "flylora" if isinstance(config, FlyLoraConfig) else "lora" if isinstance(config, LoraConfig) else "splitlora"


def _read_config(path: Path, kinds: Collection[Kind]) -> FlyLoraConfig | LoraConfig | SplitLoraConfig:
    file = path / CONFIG_FILE
    if not path.is_dir():
        raise UserError(
            f"There is no adapter folder {path}: give the folder that training or PEFT's save_pretrained wrote."
        )
    if not file.is_file():
        raise UserError(f"{path} holds no {CONFIG_FILE}, so it is not a saved adapter: give the folder that holds one.")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        peft_type = body["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a readable adapter config ({error!r}): get the adapter again.") from error
    if str(peft_type).lower() not in kinds:
        *others, last = (KIND_NAMES[kind] for kind in kinds)
        raise UserError(
            f"{path} is a {peft_type} adapter, but only {', '.join(others)} and {last} adapters can be used here."
        )
    try:
        config = PeftConfig.from_peft_type(**body)
    except UserError as error:
        raise UserError(f"{file} does not describe a usable adapter: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} does not describe a usable adapter ({error}): get the original.") from error
    assert isinstance(config, (FlyLoraConfig, LoraConfig, SplitLoraConfig))
    return config


def _refuse_lora_variants(path: Path, config: LoraConfig) -> None:
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


def _read_header(path: Path, kind: Kind) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of all tensors by module and name."""
    file = path / WEIGHTS_FILE
    if not file.is_file():
        pickled = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (path / name).exists()), None)
        reason = f"only the pickled {pickled}, which is never opened" if pickled else "no weights"
        raise UserError(f"{path} holds {reason}: give an adapter saved as {WEIGHTS_FILE}.")
    try:
        with safe_open(str(file), framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or cut off ({error}): get the adapter again.") from error
    known = (*_REQUIRED[kind], *_OPTIONAL[kind])
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        tensor = next((name for name in known if key.endswith(f".{name}")), None)
        if tensor is None or not key.startswith(KEY_PREFIX):
            raise UserError(
                f"{file} holds the tensor '{key}', which is no factor of a {KIND_NAMES[kind]} on a "
                "linear layer: adapters on other layers or with further trained parts cannot be merged or exported."
            )
        modules.setdefault(key.removeprefix(KEY_PREFIX).removesuffix(f".{tensor}"), {})[tensor] = shape
    if not modules:
        raise UserError(f"{file} holds no adapted module: the adapter is empty, so save it again.")
    return {name: modules[name] for name in sorted(modules, key=_natural_order)}


def _natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Numbers by value, so that layer 10 comes after layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _check_module(adapter: SavedAdapter, module: str) -> None:
    """All tensors are there, with shapes that fit each other and the config."""
    shapes = adapter.shapes[module]
    missing = [name for name in _REQUIRED[adapter.kind] if name not in shapes]
    if ("flylora_A_values" in shapes) != ("flylora_A_columns" in shapes):
        missing.append("flylora_A_values or flylora_A_columns")
    if missing:
        raise UserError(
            f"{adapter.path} lacks {' and '.join(missing)} of {module}: the file is incomplete; get it again."
        )
    if adapter.kind == "lora":
        down, up = shapes["lora_A.weight"], shapes["lora_B.weight"]
        config = adapter.config
        assert isinstance(config, LoraConfig)
        expected = pattern_value(config.rank_pattern or {}, module, config.r)
        if len(down) != 2 or len(up) != 2:
            raise UserError(
                f"{module} in {adapter.path} is not a linear layer: only LoRA on linear layers can be merged."
            )
        found: Any = (down[0], up[1])
        wanted: Any = (expected, expected)
    elif isinstance(adapter.config, SplitLoraConfig):
        found = (shapes["splitlora_A"][0], shapes["splitlora_B"][1], shapes["splitlora_router"][0])
        wanted = (adapter.config.r, adapter.config.r, adapter.config.experts)
    else:
        blocks = adapter.blocks(module)
        ranks = sum(block.r for block in blocks)
        found = (shapes["flylora_B"][1:], shapes["flylora_d"], shapes["flylora_seed"], shapes["flylora_fingerprint"])
        wanted = ((ranks,), (ranks,), (len(blocks),), (len(blocks), 32))
    if found != wanted:
        raise UserError(
            f"The shapes of {module} in {adapter.path} are {found} on the rank axis, but the config asks for "
            f"{wanted}: config "
            "and weights do not belong together; get the original."
        )


# --- writing ---------------------------------------------------------------------------------------------------


class TensorFile:
    """A safetensors file written tensor by tensor in any order, so that no more than one is ever in memory.

    Args:
        path: where to write; the caller makes it appear under its final name.
        layout: dtype and shape of every tensor, which fix the header.
        metadata: further strings for the header.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.layout = dict(layout)
        self._missing = set(layout)
        # Wide types first keeps every tensor aligned to its own element size, as readers by memory map need.
        ordered = sorted(layout, key=lambda key: (-layout[key][0].itemsize, key))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._offsets: dict[str, int] = {}
        end = 0
        for key in ordered:
            dtype, shape = layout[key]
            start, end = end, end + dtype.itemsize * _count(shape)
            header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._offsets[key] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def write(self, key: str, tensor: Tensor) -> None:
        """Put one tensor into its place; it is cast to the dtype of the layout.

        Raises:
            ValueError: the layout has another shape for it, or no such tensor.
        """
        dtype, shape = self.layout[key]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"'{key}' has shape {tuple(tensor.shape)}, but the layout says {shape}.")
        raw = tensor.detach().to("cpu", dtype).contiguous().view(-1)
        self._file.seek(self._start + self._offsets[key])
        if raw.numel():
            self._file.write(raw.view(torch.uint8).numpy().data)
        self._missing.discard(key)

    def close(self) -> None:
        """Flush to disk; a file that lacks a tensor is an error."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were never written, e.g. '{min(self._missing)}'.")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _count(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def save_config(config: PeftConfig, folder: Path) -> None:
    """Write adapter_config.json, with sets in a fixed order so that equal adapters give equal files."""
    body = config.to_dict()
    ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in body.items()}
    text = json.dumps(ordered, indent=2, sort_keys=True, default=str) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


@contextmanager
def new_adapter(
    path: str | Path,
    config: PeftConfig,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    overwrite: bool = False,
) -> Iterator[TensorFile]:
    """Write an adapter folder tensor by tensor; it appears under its name only when all is written.

    Args:
        path: the folder. config: its config.
        layout: dtype and shape of each tensor by its key, ``base_model.model.<module>.<tensor>``.
        overwrite: replace an adapter that is already there.

    Raises:
        UserError: the output exists, or cannot be written.
    """
    with new_folder(path, overwrite) as folder:
        save_config(config, folder)
        with TensorFile(folder / WEIGHTS_FILE, layout) as file:
            yield file


def write_adapter(
    path: str | Path, config: PeftConfig, tensors: Mapping[str, Tensor], overwrite: bool = False
) -> SavedAdapter:
    """Write an adapter folder in one go and open it.

    Args:
        path: the folder. config: its config.
        tensors: by their keys, ``base_model.model.<module>.<tensor>``.
        overwrite: replace an adapter that is already there.

    Raises:
        UserError: the output exists, or cannot be written.
    """
    layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with new_adapter(path, config, layout, overwrite) as file:
        for key, tensor in tensors.items():
            file.write(key, tensor)
    return read_adapter(path)
