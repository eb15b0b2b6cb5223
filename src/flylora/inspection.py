"""What a saved adapter is: its base, ranks, seeds, sizes, whether its projections are the ones it was trained with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flylora.adapter_folder import SavedAdapter, read_adapter
from flylora.errors import UserError
from flylora.tuner.config import FlyLoraConfig

EXPERT_LOAD_FILE = "expert_load.json"
"""Written beside the adapter by ``flylora train``: each rank's share of the tokens at the last step, by module."""


@dataclass(frozen=True)
class ModuleSummary:
    """One adapted module.

    Attributes:
        shape: (m, n) of the base weight; n is None where the folder does not tell.
        fingerprint_ok: whether seed and fingerprint agree; None where n is not known.
        bias_steps: smallest and largest routing bias, in steps of balance_rate.
        load: least, mean and largest share of the tokens that chose a rank, and the shares' coefficient of
            variation, at the last training step; None where that was not recorded.
    """

    name: str
    shape: tuple[int, int | None]
    r: int
    k: int
    seeds: tuple[int, ...]
    fingerprint_ok: bool | None
    bias_steps: tuple[int, int]
    load: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class AdapterSummary:
    """A saved FlyLoRA or LoRA adapter. Parameter counts are numbers of entries of B (and of A for a LoRA).

    ``active`` counts what acts on one token: k columns of B in each module.
    """

    path: str
    kind: str
    base_model: str | None
    settings: dict[str, Any]
    trainable: int
    active: int
    file_bytes: int
    fingerprint: str
    modules: tuple[ModuleSummary, ...]

    @property
    def intact(self) -> bool | None:
        """Whether all projections were checked and are right; None where some could not be checked."""
        states = {module.fingerprint_ok for module in self.modules}
        return False if False in states else None if None in states else True


def inspect_adapter(path: str | Path) -> AdapterSummary:
    """Read an adapter folder and check its projections.

    Raises:
        UserError: the folder is no readable adapter.
    """
    adapter = read_adapter(path)
    shares = _read_shares(adapter.path)
    modules = tuple(_summarise(adapter, name, shares.get(name)) for name in adapter.modules)
    is_lora = adapter.kind.name == "lora"
    return AdapterSummary(
        path=str(path),
        kind=adapter.kind.name,
        base_model=adapter.base_model,
        settings=_settings(adapter),
        trainable=sum(m.shape[0] * m.r + (m.r * (m.shape[1] or 0) if is_lora else 0) for m in modules),
        active=sum(m.shape[0] * m.k + (m.k * (m.shape[1] or 0) if is_lora else 0) for m in modules),
        file_bytes=(adapter.path / "adapter_model.safetensors").stat().st_size,
        fingerprint=adapter.fingerprint,
        modules=modules,
    )


def _settings(adapter: SavedAdapter) -> dict[str, Any]:
    config = adapter.config
    if not isinstance(config, FlyLoraConfig):
        return {"r": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora}
    settings = {
        name: getattr(config, name)
        for name in ("r", "k", "alpha", "density", "projection_seed", "projection_init", "selection", "balance")
    }
    settings["balance_rate"] = config.balance_rate
    if config.blocks is not None:
        settings = {"blocks": len(config.blocks), "r": config.r, "k": config.k, "alpha": config.alpha}
    return settings | {"format_version": config.format_version, "stores_projection": adapter.stores_projection}


def _summarise(adapter: SavedAdapter, name: str, shares: list[float] | None) -> ModuleSummary:
    factors = adapter.small(name)
    n = adapter.in_features(name)
    fits: bool | None = None
    if adapter.kind.name == "flylora" and n is not None:
        try:
            factors.projections()
            fits = True
        except UserError:
            fits = False
    elif adapter.kind.name == "lora":
        fits = True
    return ModuleSummary(
        name=name,
        shape=(adapter.out_features(name), n),
        r=factors.rank,
        k=sum(min(block.k, block.r) for block in factors.routing),
        seeds=factors.identity.seeds,
        fingerprint_ok=fits,
        bias_steps=(int(factors.steps.min()), int(factors.steps.max())),
        load=None if not shares else _load_summary(shares),
    )


def _load_summary(shares: list[float]) -> tuple[float, float, float, float]:
    mean = sum(shares) / len(shares)
    variance = sum((share - mean) ** 2 for share in shares) / len(shares)
    return min(shares), mean, max(shares), variance**0.5 / mean if mean else 0.0


def _read_shares(folder: Path) -> dict[str, list[float]]:
    file = folder / EXPERT_LOAD_FILE
    if not file.is_file():
        return {}
    try:
        return {str(name): [float(v) for v in shares] for name, shares in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file} is not a readable record of expert loads ({error}): delete it.") from error


def render(summary: AdapterSummary) -> Any:
    """The summary as a rich renderable: a header, and a line for each module."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    verdict = {True: "every projection is the one it was trained with", None: "some could not be checked (n unknown)"}
    shared = _shared_parts([module.name for module in summary.modules])
    head = Table.grid(padding=(0, 2))
    head.add_column()
    head.add_column(overflow="fold")
    rows = {
        "adapter": f"{summary.path} ({summary.kind})",
        "base model": summary.base_model or "not recorded",
        "settings": ", ".join(f"{key} {value}" for key, value in summary.settings.items()),
        "parameters": f"{summary.trainable:,} trained, {summary.active:,} active on a token, "
        f"{len(summary.modules)} modules" + (f" of {'.'.join(shared)}" if shared else ""),
        "file": f"{summary.file_bytes:,} bytes, sha256 {summary.fingerprint[:16]}",
        "fingerprints": verdict.get(summary.intact, "MISMATCH: the adapter was altered, do not use it"),
    }
    for key, value in rows.items():
        head.add_row(Text(key, style="bold"), Text(value))  # not markup: paths may hold brackets
    table = Table(title=None, box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for column, justify in (
        ("module", "left"), ("m x n", "right"), ("k/r", "right"), ("A", "left"), ("bias steps", "right"),
        ("min", "right"), ("mean", "right"), ("max", "right"), ("cv", "right"),
    ):  # fmt: skip
        # On a narrow terminal the names give way and not the figures.
        table.add_column(column, justify=justify, no_wrap=column != "module", overflow="fold")  # type: ignore[arg-type]
    for module in summary.modules:
        state = {True: "ok", False: "MISMATCH", None: "?"}[module.fingerprint_ok]
        load = ["-"] * 4 if module.load is None else [f"{value:.2f}" for value in module.load]
        name = ".".join(module.name.split(".")[len(shared) :])
        table.add_row(
            Text(name), f"{module.shape[0]} x {module.shape[1] or '?'}", f"{module.k}/{module.r}", state,
            f"{module.bias_steps[0]} .. {module.bias_steps[1]}", *load,
        )  # fmt: skip
    note = "min to cv: each rank's share of the tokens at the last training step (even: k/r)"
    return Group(head, Text(), table, Text(note, style="dim"))


def _shared_parts(names: list[str]) -> list[str]:
    """The leading parts that all names have in common, their last parts aside."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared
