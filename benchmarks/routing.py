"""How evenly an adapter uses its experts on held-out tokens, and how its routing bias compares with the scores.

    python -m benchmarks routing ADAPTER TASK [--data-dir DATA] [--items 32] [--out FILE]

cv: coefficient of variation of the expert load, mean over layers. per_token: share of ranks chosen by at least 1 % and
at most 99 % of the tokens (other ranks are chosen for everybody or nobody, whatever the token is). bias_ratio: mean |d|
over the mean |y|, median over layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import base_options, table, write
from flylora import FlyLoraLinear
from flylora.adapted import adapted
from flylora.functional import add_expert_load, project, select
from flylora.lab.data import collate, encode_all
from flylora.lab.tasks import load_task
from flylora.models import load_model


def routing_statistics(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """The figures above, on one batch of tokens."""
    shares: list[torch.Tensor] = []
    ratios: list[float] = []

    def watch(layer: FlyLoraLinear, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x = args[0].flatten(0, -2)
        name = layer.active_adapters[0]
        y = project(x, layer.projection(name))
        bias = layer.routing_bias(name)
        load = torch.zeros(y.shape[1], dtype=torch.int64)
        add_expert_load(load, select(y, bias, layer.routing[name]))
        shares.append(load.float() / len(x))
        ratios.append(float(bias.abs().mean() / y.abs().mean()))

    layers = [module for module in model.modules() if isinstance(module, FlyLoraLinear)]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    share = torch.stack(shares)
    return {
        "cv": float((share.std(dim=1, correction=0) / share.mean(dim=1)).mean()),
        "per_token": float(((share >= 0.01) & (share <= 0.99)).float().mean()),
        "bias_ratio": float(torch.tensor(ratios).median()),
    }


def main() -> None:
    parser = base_options(__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("task")
    parser.add_argument("--data-dir")
    parser.add_argument("--items", type=int, default=32, help="validation items, the shortest of 100")
    options = parser.parse_args()
    loaded = load_model(options.model, options.dtype, options.device)
    task = load_task(options.task, options.data_dir)
    items = encode_all(task.examples("validation", limit=100), loaded.tokenizer, task.max_length).items
    shortest = sorted(items, key=lambda item: len(item.input_ids))[: options.items]
    batch = collate([{"input_ids": item.input_ids, "labels": item.labels} for item in shortest])
    del batch["labels"]
    with adapted(loaded, options.adapter) as (model, _):
        figures = routing_statistics(model, {name: tensor.to(options.device) for name, tensor in batch.items()})
    row = [f"{value:.2f}" for value in figures.values()]
    write(options.out, {"task": task.name, "items": len(shortest), **figures}, table(list(figures), [row]))


if __name__ == "__main__":
    main()
