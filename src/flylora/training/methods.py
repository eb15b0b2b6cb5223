"""PEFT methods by name: their configs from plain options, and the adapter put on a model."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import flylora  # noqa: F401  registers FLYLORA with PEFT
from flylora.errors import UserError
from flylora.models import first_line

# Filled in by PEFT or by this package; a user who sets them would contradict what is being trained.
_NOT_OPTIONS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)

_OWN_TARGETS = frozenset({"ia3", "ln_tuning", "trainable_tokens"})


def method_names() -> list[str]:
    """Every method an adapter can be trained by, in lower case."""
    return sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def method_config(method: str, options: dict[str, Any]) -> PeftConfig:
    """The PEFT config of a method for causal language modelling.

    Args:
        method: One of ``method_names()``, in any case.
        options: Fields of that method's config. ``target_modules`` is "all-linear" where the method has the field and
            the options do not set it.

    Raises:
        UserError: No such method or option, or values the method refuses.
    """
    classes = {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    cls = classes.get(method.lower())
    if cls is None:
        raise UserError(
            f"Unknown method '{method}'{_guess(method, classes)}: choose one of {', '.join(sorted(classes))}."
        )
    valid = {field.name for field in dataclasses.fields(cls) if field.init} - _NOT_OPTIONS
    for name in options:
        if name not in valid:
            raise UserError(
                f"The method {method} has no option '{name}'{_guess(name, valid)}: choose among "
                f"{', '.join(sorted(valid))}."
            )
    every_linear = "target_modules" in valid and method.lower() not in _OWN_TARGETS
    defaults = {"target_modules": "all-linear"} if every_linear else {}
    try:
        return cls(task_type=TaskType.CAUSAL_LM, **{**defaults, **options})
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"The options of {method} do not go together: {first_line(error)}.") from error


def attach(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """Puts a new adapter on a model, its initial weights drawn from ``seed`` without touching global random state.

    Raises:
        UserError: The config matches no module of the model, or the method cannot adapt the modules it matches.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except UserError:
            raise
        except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _explain(error, model, config) from error


def _explain(error: Exception, model: PreTrainedModel, config: PeftConfig) -> UserError:
    text = str(error).lower()
    if "target modules" in text or "target_modules" in text or "targeted" in text:
        wanted = getattr(config, "target_modules", None)
        wanted = ", ".join(sorted(wanted)) if isinstance(wanted, set | list | tuple) else wanted
        return UserError(
            f"target_modules {wanted} match nothing this method can adapt in {type(model).__name__}: choose among "
            f"{', '.join(linear_names(model))}, or all-linear."
        )
    return UserError(
        f"The method {PeftType(config.peft_type).value.lower()} cannot adapt {type(model).__name__} with these options "
        f"({first_line(error)}): change the options or the method."
    )


def linear_names(model: torch.nn.Module) -> list[str]:
    """The last name component of every linear module, sorted: what target_modules may name."""
    found = {
        name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)
    }
    return sorted(found)


def _guess(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
