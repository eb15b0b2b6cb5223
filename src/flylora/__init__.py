"""flylora: FlyLoRA adapters for PEFT.

Importing it makes ``FLYLORA`` a PEFT type: ``get_peft_model``, ``PeftModel.from_pretrained`` and the rest then know
[`FlyLoraConfig`] like any other config, and those of `flylora.baselines` too. PEFT itself is imported only when it is
needed: the registration runs at once where PEFT has been imported already, and otherwise right after its import.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .balance import BalanceCallback, balance_model, expert_shares
    from .tuner import FlyLoraConfig, FlyLoraLinear, FlyLoraModel

__version__ = "0.1.0"

_LAZY = {
    "FlyLoraConfig": ".tuner",
    "FlyLoraLinear": ".tuner",
    "FlyLoraModel": ".tuner",
    "BalanceCallback": ".balance",
    "balance_model": ".balance",
    "expert_shares": ".balance",
}

__all__ = [
    "BalanceCallback",
    "FlyLoraConfig",
    "FlyLoraLinear",
    "FlyLoraModel",
    "UserError",
    "__version__",
    "balance_model",
    "expert_shares",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisteringLoader(Loader):
    """PEFT's own loader, and after it our registration."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # The module must look as if its own loader had made it: importlib.resources and pickling ask for it.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(".tuner", __name__)


class _PeftImportHook(MetaPathFinder):
    """Finds "peft" as the other finders do, and lets [`_RegisteringLoader`] load it.

    It stays after a search: asking whether PEFT is installed, as transformers does, is not yet importing it.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


if "peft" in sys.modules:
    importlib.import_module(".tuner", __name__)
else:
    sys.meta_path.insert(0, _PeftImportHook())
