"""FlyLoRA layers: they hold the tensors of their adapters and call the functions of `flylora.functional`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flylora import functional
from flylora.errors import UserError
from flylora.functional import Block
from flylora.kernels import cpu as native
from flylora.projection import NonZeros as SparseProjection
from flylora.projection import Projection, canonical_name, densify, derive_seed, fingerprint, sparsify
from flylora.tuner import ablations, balance
from flylora.tuner.ablations import Ablation
from flylora.tuner.config import BlockConfig, FlyLoraConfig
from flylora.tuner.weights import merge_updates, shifted_weight


@dataclass
class ProjectionState:
    """What one adapter's A in one layer is made of.

    ``seeds`` holds each block's own seed; ``digests`` the blocks' fingerprints once A was generated. ``restored`` says
    that A came from a file and is not to be regenerated.
    """

    seeds: tuple[int, ...]
    digests: tuple[bytes, ...] | None = None
    restored: bool = False


class WatchedBufferDict(BufferDict):
    """Persistent buffers that remember when a loader replaced them, so that what depends on them is made again."""

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self.changed: set[str] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", {}):
            self.changed.add(name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.changed.update(name for name in self._buffers if prefix + name in state_dict)


class RoutingContext:
    """What all layers of one model share: which tokens are padding, and how the model's loss was scaled (None: 1)."""

    def __init__(self) -> None:
        self.token_mask: Tensor | None = None
        self.loss_scale: Tensor | None = None

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask of x's tokens, flattened to (N,), or None where it does not describe them."""
        mask = self.token_mask
        if mask is None or mask.shape != x.shape[:-1]:
            return None
        return mask.reshape(-1)


class FlyLoraLinear(nn.Module, BaseTunerLayer):
    """FlyLoRA adapters on nn.Linear, on a quantized linear layer, or on transformers' Conv1D.

    In each dictionary the key is the adapter's name.

    Attributes:
        flylora_B: B, (m, r), the only trainable tensors.
        flylora_A: A, (r, n) float32, outside the module's state: it is regenerated, never stored or broadcast.
        flylora_d: the routing bias as an int32 count of steps, (r,); d = balance_rate x count. Integers survive every
            cast of the model.
        flylora_seed, flylora_fingerprint: what identifies A, (T,) int64 and (T, 32) uint8, for the adapter file.
        expert_load: tokens that chose each rank since the last optimizer step, (r,) int64; a plain attribute, because
            DDP overwrites buffers. ``last_load`` is what it was at that step.
        ablations: of adapters that are not the default method, what differs; ``flylora_trained_A`` then holds an A
            that trains, (r, n), and ``flylora_steps`` the steps done so far, (1,) int32, where it does so for a while.
    """

    adapter_layer_names: tuple[str, ...] = ("flylora_B", "flylora_trained_A")
    other_param_names: tuple[str, ...] = (
        "flylora_A",
        "flylora_d",
        "flylora_seed",
        "flylora_fingerprint",
        "flylora_dropout",
        "expert_load",
        "last_load",
        "routing",
        "block_configs",
        "projection_state",
        "scaling",
        "base_scaling",
        "ablations",
        "flylora_steps",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: FlyLoraConfig,
        module_name: str,
        context: RoutingContext,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.module_name = canonical_name(module_name)
        self.context = context
        self.flylora_B = nn.ParameterDict({})
        self.flylora_A: dict[str, Tensor] = {}
        self.flylora_trained_A = nn.ParameterDict({})
        self.flylora_steps = BufferDict(persistent=True)
        self.ablations: dict[str, Ablation] = {}
        self.flylora_d = BufferDict(persistent=True)
        self.flylora_seed = WatchedBufferDict()
        self.flylora_fingerprint = WatchedBufferDict()
        self.flylora_dropout = nn.ModuleDict({})
        self.expert_load: dict[str, Tensor] = {}
        self.last_load: dict[str, Tensor] = {}
        self.routing: dict[str, tuple[Block, ...]] = {}
        self.block_configs: dict[str, tuple[BlockConfig, ...]] = {}
        self.projection_state: dict[str, ProjectionState] = {}
        self._known_up: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._known_bias: dict[str, tuple[Tensor, int, torch.dtype, Tensor]] = {}
        self.scaling: dict[str, float] = {}
        self.base_scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"Unsupported layer type {type(self.get_base_layer())}")
        self.in_features, self.out_features = in_features, out_features
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)
        self.register_load_state_dict_post_hook(_after_load)

    # --- adapters ---------------------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, config: FlyLoraConfig, inference_mode: bool = False, **kwargs: Any
    ) -> None:
        """Add an adapter: B = 0, d = 0, A from (projection_seed, this module's name)."""
        blocks = tuple(config.blocks_at(self.module_name))
        ranks = sum(block.r for block in blocks)
        seeds = tuple(derive_seed(block.projection_seed, self.module_name) for block in blocks)
        self.block_configs[adapter_name] = blocks
        self.routing[adapter_name] = tuple(Block(block.r, block.k, block.selection) for block in blocks)
        self.scaling[adapter_name] = self.base_scaling[adapter_name] = config.scaling_at(self.module_name)
        self.flylora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        # Zeros come later: an adapter that is about to be loaded is made on the meta device and never needs them.
        self.flylora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, ranks))
        self.flylora_d[adapter_name] = torch.zeros(ranks, dtype=torch.int32)
        self.flylora_seed[adapter_name] = torch.zeros(len(blocks), dtype=torch.int64)
        self.flylora_fingerprint[adapter_name] = torch.zeros(len(blocks), 32, dtype=torch.uint8)
        if config.balance == "loss_free" and any(not block.is_linear for block in self.routing[adapter_name]):
            # Made on the CPU even under a meta-device context: a count has no other place to come from.
            self.expert_load[adapter_name] = torch.zeros(ranks, dtype=torch.int64, device="cpu")
        self.projection_state[adapter_name] = ProjectionState(seeds)
        self.flylora_A.pop(adapter_name, None)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.flylora_seed.changed.discard(adapter_name)
        self.flylora_fingerprint.changed.discard(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        if self.flylora_B[adapter_name].device.type != "meta":
            nn.init.zeros_(self.flylora_B[adapter_name])
            self.projection(adapter_name)
        ablations.prepare(self, adapter_name, config)
        balance.track(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        balance.track(self)
        ablations.track(self)

    # --- the projection A ---------------------------------------------------------------------------------------

    def projection(self, adapter_name: str, device: torch.device | None = None) -> Tensor:
        """A, (r, n) float32, generated on the first demand and moved to the device it is asked for."""
        if self.ablations and adapter_name in self.flylora_trained_A:
            return ablations.current_projection(self, adapter_name)
        if adapter_name in self.flylora_seed.changed or adapter_name in self.flylora_fingerprint.changed:
            self._adopt_loaded_identity(adapter_name)
        dense = self.flylora_A.get(adapter_name)
        if dense is None:
            dense = self._generate(adapter_name)
        if device is not None and dense.device != device and device.type != "meta":
            with torch.inference_mode(False):  # A outlives the call: an inference tensor could never be trained with
                dense = self.flylora_A[adapter_name] = dense.to(device)
        return dense

    def _generate(self, adapter_name: str) -> Tensor:
        state = self.projection_state[adapter_name]
        parts = [
            generate_block(seed, block, self.in_features)
            for seed, block in zip(state.seeds, self.block_configs[adapter_name], strict=True)
        ]
        digests = tuple(fingerprint(part, self.in_features) for part in parts)
        if state.digests is not None and digests != state.digests:
            raise UserError(_MISMATCH.format(name=self.module_name))
        self._keep(adapter_name, state.seeds, digests, parts, restored=False)
        return self.flylora_A[adapter_name]

    def _keep(
        self,
        adapter_name: str,
        seeds: tuple[int, ...],
        digests: tuple[bytes, ...],
        parts: list[SparseProjection],
        restored: bool,
    ) -> None:
        if adapter_name not in self.flylora_trained_A:
            with torch.inference_mode(False):
                self.flylora_A[adapter_name] = torch.cat([densify(part, self.in_features) for part in parts])
        self.projection_state[adapter_name] = ProjectionState(seeds, digests, restored)
        # Random selection follows the seed in use, too, which a file may have brought.
        self.routing[adapter_name] = tuple(
            block._replace(noise_seed=seed % (1 << 32))
            for block, seed in zip(self.routing[adapter_name], seeds, strict=True)
        )
        self._write_identity(adapter_name)

    def _write_identity(self, adapter_name: str) -> None:
        """Put what identifies A into the buffers that are saved."""
        state = self.projection_state[adapter_name]
        assert state.digests is not None
        if self.flylora_seed[adapter_name].device.type == "meta":
            return
        seeds, digests = identity_tensors(state)
        with torch.no_grad():
            self.flylora_seed[adapter_name].copy_(seeds)
            self.flylora_fingerprint[adapter_name].copy_(digests)

    def _adopt_loaded_identity(self, adapter_name: str) -> None:
        """After a loader replaced seed or fingerprint: make the A they stand for, and check that it is the one."""
        self.flylora_seed.changed.discard(adapter_name)
        self.flylora_fingerprint.changed.discard(adapter_name)
        seed, digest = self.flylora_seed[adapter_name], self.flylora_fingerprint[adapter_name]
        if seed.device.type == "meta" or digest.device.type == "meta":
            return
        digests = tuple(bytes(row.tolist()) for row in digest.cpu())
        seeds = tuple(seed.tolist())
        state = self.projection_state[adapter_name]
        known = adapter_name in self.flylora_A or adapter_name in self.flylora_trained_A
        if (state.seeds, state.digests) == (seeds, digests) and known:
            return
        self.flylora_A.pop(adapter_name, None)
        self.projection_state[adapter_name] = ProjectionState(seeds, digests)
        self._generate(adapter_name)

    def projection_from_file(
        self,
        adapter_name: str,
        seeds: tuple[int, ...],
        digests: tuple[bytes, ...],
        stored: SparseProjection | None,
    ) -> Callable[[], None]:
        """A as a file has it: its stored non-zeros, or what the seeds give. The returned function puts it to use.

        Nothing changes before that call, so that all layers can be checked first.

        Raises:
            flylora.UserError: naming the module, when A is not what the fingerprint says.
        """
        if stored is None:
            state, current = self.projection_state[adapter_name], self.flylora_A.get(adapter_name)
            same = (state.seeds, state.digests, state.restored) == (seeds, digests, False)
            if same and current is not None and self._digests(adapter_name, current) == digests:
                return lambda: None
            parts = [
                generate_block(seed, block, self.in_features)
                for seed, block in zip(seeds, self.block_configs[adapter_name], strict=True)
            ]
            found = tuple(fingerprint(part, self.in_features) for part in parts)
        else:
            inside = (stored.columns >= 0) & (stored.columns < self.in_features)
            if stored.columns.numel() == 0 or not inside.all():
                raise UserError(
                    f"The stored projection of {self.module_name} names columns outside its {self.in_features} inputs: "
                    "the adapter file is damaged or belongs to another base model."
                )
            ranks = [block.r for block in self.block_configs[adapter_name]]
            parts = [
                SparseProjection(values, columns)
                for values, columns in zip(stored.values.split(ranks), stored.columns.split(ranks), strict=True)
            ]
            found = self._digests(adapter_name, densify(stored, self.in_features))
        if found != digests:
            raise UserError(_MISMATCH.format(name=self.module_name))
        return partial(self._keep, adapter_name, seeds, digests, parts, restored=stored is not None)

    def _digests(self, adapter_name: str, dense: Tensor) -> tuple[bytes, ...]:
        """The fingerprints of the blocks of a dense A, in whatever way it was made."""
        parts = dense.detach().cpu().split([block.r for block in self.block_configs[adapter_name]])
        return tuple(fingerprint(sparsify(part), self.in_features) for part in parts)

    def identity_for_saving(
        self, adapter_name: str, save_projection: bool
    ) -> tuple[ProjectionState, SparseProjection | None]:
        """What the adapter file says of A: seeds and fingerprints, and A's non-zeros with ``save_projection``.

        Raises:
            flylora.UserError: when A was edited in memory and would be lost.
        """
        dense = self.projection(adapter_name)
        state = self.projection_state[adapter_name]
        digests = self._digests(adapter_name, dense)
        if save_projection:
            return ProjectionState(state.seeds, digests), sparsify(dense.detach().cpu())
        if state.restored or digests != state.digests:
            raise UserError(
                f"The projection of {self.module_name} is not the one its seed gives, so the seed alone cannot restore "
                "it: set save_projection=True in the adapter's config before saving."
            )
        return state, None

    # --- forward ------------------------------------------------------------------------------------------------

    def routing_bias(self, adapter_name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """d = u x count, (r,), in the units of the scores."""
        steps = self.flylora_d[adapter_name]
        if torch.compiler.is_compiling() or steps.is_inference():
            return self._routing_bias(adapter_name, dtype)
        # It changes once an optimizer step and is asked for by every forward: remembered by its tensor's version.
        known = self._known_bias.get(adapter_name)
        if known is None or known[0] is not steps or known[1:3] != (steps._version, dtype):
            with torch.inference_mode(False):
                known = (steps, steps._version, dtype, self._routing_bias(adapter_name, dtype))
                self._known_bias[adapter_name] = known
        return known[3]

    def _routing_bias(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        steps = self.flylora_d[adapter_name].to(torch.promote_types(dtype, torch.float32))
        rates = [block.balance_rate for block in self.block_configs[adapter_name]]
        if len(set(rates)) == 1:
            return steps * rates[0]
        ranks = [block.r for block in self.block_configs[adapter_name]]
        return torch.cat([part * rate for part, rate in zip(steps.split(ranks), rates, strict=True)])

    def _update_arguments(self, adapter_name: str, x: Tensor) -> dict[str, Any]:
        """The arguments that `functional.routed_update` and `routed_linear` share."""
        load = None
        if self.training and adapter_name in self.expert_load:
            load = self.expert_load[adapter_name]
            if load.device != x.device:
                load = self.expert_load[adapter_name] = load.to(x.device)
        return {
            "projection": self.projection(adapter_name, x.device),
            "up": self.flylora_B[adapter_name],
            "routing_bias": self.routing_bias(adapter_name, x.dtype),
            "blocks": self.routing[adapter_name],
            "scaling": self.scaling[adapter_name],
            "load": load,
            "token_mask": None if load is None else self.context.mask_for(x),
        }

    def _can_fuse(self, x: Tensor, args: Any, kwargs: Any) -> bool:
        """Whether base product and update may be computed in one pass: a plain frozen layer that nobody watches."""
        base = self.base_layer
        if type(base) not in (nn.Linear, Conv1D) or args or kwargs or self.quantization_backend is not None:
            return False
        if self.ablations and len(self.flylora_trained_A):
            return False
        watched = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if watched or "forward" in base.__dict__:
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False
        bias_trains = base.bias is not None and base.bias.requires_grad
        return base.weight.dtype == x.dtype and not base.weight.requires_grad and not bias_trains

    def _forward_one(self, adapter_name: str, x: Tensor, base_out: Tensor | None) -> Tensor:
        shared = self._update_arguments(adapter_name, x)
        dropout = self.flylora_dropout[adapter_name]
        dropped = x
        if isinstance(dropout, nn.Dropout) and dropout.training:
            dropped = functional.dropout(x, dropout.p)
        ablation = self.ablations.get(adapter_name)
        if ablation is not None:
            dropped, shared = ablations.altered(ablation, self, dropped, shared)
        up, blocks, bias = shared["up"], shared["blocks"], shared["routing_bias"]
        fast = native.usable(x, up, shared["projection"], bias, blocks, base_out)
        if fast and not torch.is_grad_enabled() and not up.is_inference():
            out = (
                F.linear(dropped, *self._frozen()).contiguous()
                if base_out is None
                else base_out.clone(memory_format=torch.contiguous_format)
            )
            up_t = self._transposed_up(adapter_name, up)
            native.routed_add_(out, dropped, shared["projection"], up_t, bias, blocks, shared["scaling"])
            return out
        if base_out is not None:
            return functional.routed_update(base_out, dropped, **shared)
        compute = native.routed_linear if fast else functional.routed_linear
        return compute(dropped, *self._frozen(), **shared)

    def _frozen(self) -> tuple[Tensor, Tensor | None]:
        """The base layer's weight (m, n) and bias."""
        base: Any = self.base_layer
        return base.weight.t() if isinstance(base, Conv1D) else base.weight, base.bias

    def _transposed_up(self, adapter_name: str, up: Tensor) -> Tensor:
        """B^T, contiguous, remembered while B does not change; for use without gradients."""
        known = self._known_up.get(adapter_name)
        if known is None or known[0] is not up or known[1] != up._version:
            with torch.inference_mode(False):
                known = self._known_up[adapter_name] = (up, up._version, up.detach().t().contiguous())
        return known[2]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """out = W x + the active adapters' updates; x is (..., n), the result (..., m)."""
        adapter_names: Optional[list[str]] = kwargs.pop("adapter_names", None)
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            elif adapter_names is not None:
                raise ValueError("Cannot pass `adapter_names` when there are merged adapters: unmerge them first.")
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        active = [name for name in self.active_adapters if name in self.flylora_B]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        out = None
        drops = self.training and not isinstance(self.flylora_dropout[active[0]], nn.Identity)
        if drops or not self._can_fuse(x, args, kwargs):
            out = self._base_forward(x, *args, **kwargs)
        for name in active:
            out = self._forward_one(name, x, out)
        assert out is not None
        return out

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.base_layer(x, *args, **kwargs)
        return out if self.quantization_backend is None else self.quantization_backend.maybe_clone_base_result(out)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Each sample of the batch through the adapter named for it; "__base__" means none."""
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}: give one name a sample."
            )
        base_out = self._base_forward(x, *args, **kwargs)
        out = base_out.clone()
        for name in dict.fromkeys(adapter_names):
            if name not in self.flylora_B:
                continue
            rows = [i for i, wanted in enumerate(adapter_names) if wanted == name]
            out[rows] = self._forward_one(name, x[rows], base_out[rows])
        return out

    # --- merging into the weights, exact for linear adapters only --------------------------------------------------

    def is_linear(self, adapter_name: str) -> bool:
        """Whether the adapter is B A here (k = r), so that it can be added to the weights exactly."""
        return all(block.is_linear for block in self.routing[adapter_name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Only a linear adapter (k = r) is a LoRA."""
        return adapter_name not in self.routing or self.is_linear(adapter_name)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """s B A in the shape of the base layer's weight, (m, n) or, for Conv1D, (n, m); exact for k = r only.

        Raises:
            flylora.UserError: for a routed adapter.
        """
        if not self.is_linear(adapter_name):
            raise UserError(ROUTED_MERGE.format(name=adapter_name))
        up = self.flylora_B[adapter_name]
        dtype = torch.promote_types(up.dtype, torch.float32)
        delta = (up.to(dtype) * self.scaling[adapter_name]) @ self.projection(adapter_name, up.device).to(dtype)
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Add linear adapters to the base weight; ``safe_merge`` checks the result for NaN and infinity first."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.flylora_B]
        merge_updates(self, {name: self.get_delta_weight(name) for name in names}, safe_merge)

    def unmerge(self) -> None:
        """Subtract the merged adapters from the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.flylora_B:
                self.set_base_weight(shifted_weight(self, -self.get_delta_weight(name)))

    # --- scaling, as PEFT's helpers set it ---------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale the adapter's update by ``scale`` times its own alpha / r."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.base_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: Optional[float] = None) -> None:
        """Undo [`scale_layer`]: divide by ``scale``, or return to alpha / r for None."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.base_scaling[name] if scale is None else self.scaling[name] / scale

    def __repr__(self) -> str:
        return "flylora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def _after_load(layer: FlyLoraLinear, incompatible_keys: Any) -> None:
    """Make A again as soon as a plain load_state_dict changed what it is made from."""
    for name in sorted(layer.flylora_seed.changed | layer.flylora_fingerprint.changed):
        layer._adopt_loaded_identity(name)


def generate_block(seed: int, block: BlockConfig, in_features: int) -> SparseProjection:
    """One block's A from the layer's own seed."""
    part = Projection.draw(seed, block.r, in_features, block.density, block.projection_init)
    return part.nonzeros


def identity_tensors(state: ProjectionState) -> tuple[Tensor, Tensor]:
    """Seeds (T,) int64 and fingerprints (T, 32) uint8, as the adapter file holds them."""
    assert state.digests is not None
    seeds = torch.tensor(state.seeds, dtype=torch.int64, device="cpu")
    digests = torch.tensor([list(digest) for digest in state.digests], dtype=torch.uint8, device="cpu")
    return seeds, digests


_MISMATCH = (
    "The projection of {name} is not the one that this adapter was trained with: seed and fingerprint in the adapter "
    "file disagree, so the file or its config's r, density or projection_init was altered, or the base model is "
    "another one: get the original adapter and base, or one saved with save_projection=True, which only "
    "PeftModel.from_pretrained and load_adapter of a PeftModel can read."
)

ROUTED_MERGE = (
    "The adapter '{name}' routes (k < r), so it is not linear in its input and cannot be added to the weights "
    "exactly: combine adapters with `flylora merge`, approximate it by a plain LoRA or full weights with "
    "`flylora export`, or train with k = r."
)
