"""The FlyLoRA tuner: which layers are replaced, what is saved, and what a loaded file must satisfy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flylora.errors import UserError
from flylora.projection import WRAPPER_NAMES, densify
from flylora.projection import NonZeros as SparseProjection
from flylora.tuner.ablations import LossScaleHook
from flylora.tuner.config import FlyLoraConfig
from flylora.tuner.layer import (
    ROUTED_MERGE,
    FlyLoraLinear,
    RoutingContext,
    identity_tensors,
)
from flylora.tuner.registration import PREFIX

# Their fused kernels read the projection's weight themselves, so an adapter on it would never be called.
_MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_MAMBA_BYPASSED = frozenset({"out_proj", "conv1d"})

_TENSORS = ("flylora_B", "flylora_d", "flylora_seed", "flylora_fingerprint")
_VALUES, _COLUMNS = "flylora_A_values", "flylora_A_columns"
_OURS = frozenset({*_TENSORS, _VALUES, _COLUMNS})
_DTYPES = {  # B has whatever type it was trained in
    "flylora_d": torch.int32,
    "flylora_seed": torch.int64,
    "flylora_fingerprint": torch.uint8,
    _VALUES: torch.float32,
    _COLUMNS: torch.int32,
}


class PaddingMaskHook:
    """Before each forward of the model: tells its layers which tokens the attention mask calls padding."""

    def __init__(self, context: RoutingContext) -> None:
        self.context = context
        self._positions: dict[type, int] = {}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            position = self._position(model)
            mask = args[position] if 0 <= position < len(args) else None
        is_mask = isinstance(mask, Tensor) and mask.dim() == 2
        self.context.token_mask = mask.bool() if is_mask else None  # type: ignore[union-attr]

    def _position(self, model: nn.Module) -> int:
        if type(model) not in self._positions:
            names = list(inspect.signature(type(model).forward).parameters)[1:]
            self._positions[type(model)] = names.index("attention_mask") if "attention_mask" in names else -1
        return self._positions[type(model)]


class FlyLoraModel(BaseTuner):
    """Puts FlyLoRA adapters into a model (Zou et al., NeurIPS 2025); use it through `peft.get_peft_model`.

    Args:
        model: the model to adapt, any `torch.nn.Module`.
        config: a [`FlyLoraConfig`].
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by a load.

    Raises:
        TypeError: for layers other than nn.Linear, Conv1D and the quantized linears PEFT knows.
        ValueError: for layers whose adapter would never be called (nn.MultiheadAttention.out_proj, Mamba mixers).
    """

    prefix: str = PREFIX
    tuner_layer_cls = FlyLoraLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # --- injection ------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            if type(error).__name__ != "NoMatchingPeftModuleError":
                raise
            names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if _is_supported(m)})
            raise type(error)(f"{error} The model's adaptable modules are named: {', '.join(names)}.") from error
        widths = {layer.module_name: layer.in_features for _, layer in _layers_with(model, adapter_name)}
        self.peft_config[adapter_name].remember_in_features(widths)
        self._install_padding_hook(model)
        if self.peft_config[adapter_name].balance == "aux_loss":
            _remove_loss_scale_hook(model)
            model.register_forward_hook(LossScaleHook(self._context(model)))

    def _install_padding_hook(self, model: nn.Module) -> None:
        # An encoder-decoder has two masks and cross-attention sees both sides: there padding is counted.
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return
        if any(isinstance(hook, PaddingMaskHook) for hook in model._forward_pre_hooks.values()):
            return
        model.register_forward_pre_hook(PaddingMaskHook(self._context(model)), with_kwargs=True)

    def _context(self, model: nn.Module) -> RoutingContext:
        """The context that all FlyLoRA layers of the model share."""
        for module in model.modules():
            if isinstance(module, FlyLoraLinear):
                return module.context
        return RoutingContext()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
    ) -> Any:
        if merge:
            self._refuse_routed(adapter_names)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, PaddingMaskHook):
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
        _remove_loss_scale_hook(model)
        return model

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(peft_config, model, target_name)
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in _MAMBA_TYPES and target_name in _MAMBA_BYPASSED:
            raise ValueError(
                f"'{target_name}' of a {model_type} model is read by its fused kernel and never called, so an adapter "
                "there would do nothing: leave it out of target_modules."
            )

    def _create_and_replace(
        self,
        peft_config: FlyLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"'{current_key}' belongs to nn.MultiheadAttention, which reads its weight and never calls it, so an "
                "adapter there would do nothing: leave it out of target_modules."
            )
        if isinstance(target, FlyLoraLinear):
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            if adapter_name not in self.active_adapters:
                target.set_requires_grad(adapter_name, False)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not _is_supported(base):
            raise TypeError(
                f"'{current_key}' is a {type(base).__name__}, but FlyLoRA adapts nn.Linear, Conv1D and quantized "
                "linear layers only: leave it out of target_modules."
            )
        _refuse_tensor_parallel(base, current_key)
        new_module = FlyLoraLinear(
            target,
            adapter_name,
            peft_config,
            module_name=current_key,
            context=self._context(self.model),
            **get_quantization_kwargs(self),
        )
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    # --- merging into the weights ---------------------------------------------------------------------------------

    def _refuse_routed(self, adapter_names: Optional[list[str]]) -> None:
        """Before any layer is touched: a refusal inside a later layer would leave half the model merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for module in self.model.modules():
            if isinstance(module, FlyLoraLinear):
                for name in names:
                    if name in module.routing and not module.is_linear(name):
                        raise UserError(ROUTED_MERGE.format(name=name))

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """Add linear adapters (k = r) to the weights, in place; routed ones are refused before anything changes."""
        self._refuse_routed(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Only a linear adapter (k = r) is a LoRA."""
        layers = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        return all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    # --- mixed batches ----------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Route each sample through the adapter that ``adapter_names`` gives it, for the time of one call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, FlyLoraLinear)]
        known = {name for layer in layers for name in layer.flylora_B}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; the model has "
                f"{', '.join(sorted(known))}."
            )
        decoder_names = list(adapter_names)
        num_beams = kwargs.get("num_beams")
        if isinstance(num_beams, int) and num_beams > 1:
            # Beam search repeats every sample; an encoder still sees the batch as it was given.
            decoder_names = [name for name in adapter_names for _ in range(num_beams)]
        handles = []
        try:
            for name, module in self.named_modules():
                if isinstance(module, FlyLoraLinear) or _takes_adapter_names(module):
                    names = adapter_names if "encoder" in name.split(".") else decoder_names
                    handles.append(module.register_forward_pre_hook(_AdapterNames(list(names)), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- saving and loading -----------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        kept = ".".join(part for part in key.split(".") if part not in WRAPPER_NAMES)
        return super()._remove_adapter_name_from_key(kept, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors, with what identifies A written afresh and A itself with ``save_projection``."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in _layers_with(model, adapter_name):
            if f"{name}.flylora_B.{adapter_name}" not in selected:
                continue  # a sharded save keeps other layers elsewhere
            selected.pop(f"{name}.flylora_trained_A.{adapter_name}", None)  # kept as any stored projection is
            state, stored = layer.identity_for_saving(adapter_name, config.save_projection)
            seeds, digests = identity_tensors(state)
            selected[f"{name}.flylora_seed.{adapter_name}"] = seeds
            selected[f"{name}.flylora_fingerprint.{adapter_name}"] = digests
            if stored is not None:
                selected[f"{name}.{_VALUES}.{adapter_name}"] = stored.values
                selected[f"{name}.{_COLUMNS}.{adapter_name}"] = stored.columns
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's tensors against the model before anything is loaded, and take A from them.

        Raises:
            flylora.UserError: for missing or surplus tensors, other shapes, or an A that is not the fingerprint's.
        """
        remapped = dict(super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict))
        layers = dict(_layers_with(model, adapter_name))
        keys = {_canonical_key(key): key for key in remapped if not _OURS.isdisjoint(key.split(".")[-2:])}
        base = getattr(config, "base_model_name_or_path", None) or "its base model"
        pending, loaded = [], {}
        for name, layer in layers.items():
            short = _canonical_key(name)
            found: dict[str, Tensor] = {}
            for tensor in (*_TENSORS, _VALUES, _COLUMNS):
                for candidate in (f"{short}.{tensor}.{adapter_name}", f"{short}.{tensor}"):
                    if candidate in keys:
                        key = keys.pop(candidate)
                        found[tensor] = remapped.pop(key)
                        if tensor in _TENSORS:
                            # A key that names a wrapper, or lacks PEFT's prefix, is not the model's own.
                            known = key.endswith(f".{adapter_name}")
                            loaded[key if known else f"{name}.{tensor}.{adapter_name}"] = found[tensor]
            _check_tensors(short, layer, adapter_name, found, base)
            pending.append((name, layer, found))
        if keys:
            raise UserError(
                f"The adapter file has tensors for modules that this model does not adapt, e.g. '{min(keys)}' "
                f"({len(keys)} in all): it was trained on another base model ({base}) or with other target_modules."
            )
        with ThreadPoolExecutor(max_workers=min(8, torch.get_num_threads())) as pool:
            # Making A is all the work there is, and leaves Python's lock to others most of the time.
            accept = list(pool.map(lambda item: _projection_of_file(adapter_name, *item), pending))
            for name, layer, found in pending:
                if adapter_name in layer.flylora_trained_A:
                    if _VALUES not in found:
                        raise UserError(
                            f"The adapter file lacks the trained projection of {_canonical_key(name)} ({_VALUES}): it "
                            "is incomplete, or its config was edited."
                        )
                    stored = SparseProjection(found[_VALUES], found[_COLUMNS])
                    loaded[f"{name}.flylora_trained_A.{adapter_name}"] = densify(stored, layer.in_features)
            list(pool.map(lambda take: take(), accept))  # every layer was checked: a file is taken as a whole or not
        return {**remapped, **loaded}


def _projection_of_file(
    adapter_name: str, name: str, layer: FlyLoraLinear, found: dict[str, Tensor]
) -> Callable[[], None]:
    """A layer's A as a file has it, checked; the function returned puts it to use."""
    seeds = tuple(found["flylora_seed"].tolist())
    digests = tuple(bytes(row.tolist()) for row in found["flylora_fingerprint"])
    stored = SparseProjection(found[_VALUES], found[_COLUMNS]) if _VALUES in found else None
    return layer.projection_from_file(adapter_name, seeds, digests, stored)


def _remove_loss_scale_hook(model: nn.Module) -> None:
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, LossScaleHook):
            del model._forward_hooks[key]


class _AdapterNames:
    """A forward pre-hook that hands a module the adapter of each sample."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self.names}


def _takes_adapter_names(module: nn.Module) -> bool:
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, AuxiliaryTrainingWrapper)


def _is_supported(module: nn.Module) -> bool:
    if isinstance(module, (FlyLoraLinear, nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)
    return backend is not None and backend.layer_type == "linear"


def _refuse_tensor_parallel(base: nn.Module, name: str) -> None:
    weight = getattr(base, "weight", None)
    mesh = getattr(weight, "device_mesh", None)
    if mesh is not None and not set(mesh.mesh_dim_names or ()) <= {"fsdp"}:
        raise UserError(
            f"'{name}' is sharded by tensor parallelism, where FlyLoRA would route on a part of its input: use data "
            "parallelism or FSDP instead."
        )


def _layers_with(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, FlyLoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, FlyLoraLinear) and adapter_name in module.flylora_B:
            yield name.removeprefix("_fsdp_wrapped_module."), module


def _canonical_key(key: str) -> str:
    kept = ".".join(part for part in key.split(".") if part not in WRAPPER_NAMES)
    return kept.removeprefix("base_model.model.")


def _check_tensors(name: str, layer: FlyLoraLinear, adapter_name: str, found: dict[str, Tensor], base: str) -> None:
    """The file's tensors of one layer are all there and have the shapes that the model and the config ask for."""
    missing = [tensor for tensor in _TENSORS if tensor not in found]
    if (_VALUES in found) != (_COLUMNS in found):
        missing.append(_COLUMNS if _VALUES in found else _VALUES)
    if missing:
        raise UserError(
            f"The adapter file lacks {' and '.join(missing)} of {name}: it is incomplete, or was trained on another "
            f"base model ({base}) or with other target_modules."
        )
    ranks, blocks = layer.flylora_B[adapter_name].shape[1], len(layer.block_configs[adapter_name])
    expected = {
        "flylora_B": (layer.out_features, ranks),
        "flylora_d": (ranks,),
        "flylora_seed": (blocks,),
        "flylora_fingerprint": (blocks, 32),
    }
    for tensor, shape in expected.items():
        if tuple(found[tensor].shape) != shape:
            raise UserError(
                f"{tensor} of {name} has shape {tuple(found[tensor].shape)} in the adapter file, but {shape} is needed "
                f"here: the adapter belongs to another base model ({base}) or its config was edited."
            )
    if _VALUES in found:
        shapes = tuple(found[_VALUES].shape), tuple(found[_COLUMNS].shape)
        if shapes[0] != shapes[1] or shapes[0][:1] != (ranks,) or len(shapes[0]) != 2:
            raise UserError(
                f"The stored projection of {name} has shapes {shapes[0]} and {shapes[1]}, but two equal ones with "
                f"{ranks} rows are needed: the adapter file is damaged or its config was edited."
            )
    for tensor, dtype in _DTYPES.items():
        if tensor in found and found[tensor].dtype != dtype:
            raise UserError(
                f"{tensor} of {name} is {found[tensor].dtype} in the adapter file, but {dtype} is needed: the file was "
                "converted; use the original."
            )
