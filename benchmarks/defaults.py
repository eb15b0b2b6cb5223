"""How the default learning rate and balance rate were found: a small grid, judged on a validation split.

    python benchmarks/defaults.py --task configs/arc_easy.yaml --data-dir DATA --out benchmarks/records/defaults \
        --lr 1e-3 3e-3 1e-2 --balance-rate 1e-3

Every cell is one training with one seed and one JSON record; cells whose record exists are skipped, so the grid can be
interrupted and extended. alpha is not searched: the update is alpha/r z B^T and AdamW's steps do not depend on the
scale of the gradient, so alpha only rescales the learning rate.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

from flylora import FlyLoraConfig, FlyLoraLinear
from flylora.lab.data import encode_all
from flylora.lab.tasks import load_task
from flylora.models import load_model
from flylora.texts import CompletionCollator, Encoded


def answer_loss(model: Any, items: list[Encoded], batch_size: int = 16) -> float:
    """Held-out loss per answer token, in nats."""
    model.eval()
    total, count = 0.0, 0
    order = sorted(range(len(items)), key=lambda i: len(items[i].input_ids))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = collate([items[i] for i in order[start : start + batch_size]])
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            total += float(losses.sum())
            count += int((labels != -100).sum())
    return total / count


def collate(items: list[Encoded]) -> dict[str, torch.Tensor]:
    """A right-padded batch."""
    return CompletionCollator()([{"input_ids": i.input_ids, "labels": i.labels} for i in items])


def routing_statistics(model: Any, items: list[Encoded]) -> dict[str, float]:
    """How evenly the experts are used on held-out tokens, and how the routing bias compares with the scores.

    cv: coefficient of variation of the expert load, mean over layers. per_token: share of ranks chosen by at least 1%
    and at most 99% of a batch's tokens (ranks outside are chosen for everybody or nobody, whatever the token says).
    bias_ratio: mean |d| over the mean |y|, median over layers.
    """
    loads: list[torch.Tensor] = []
    ratios: list[float] = []

    def watch(layer: FlyLoraLinear, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        from flylora.functional import add_expert_load, project, select

        x = args[0].flatten(0, -2)
        y = project(x, layer.projection("default"))
        bias = layer.routing_bias("default")
        load = torch.zeros(y.shape[1], dtype=torch.int64)
        add_expert_load(load, select(y, bias, layer.routing["default"]))
        loads.append(load.float() / len(x))
        ratios.append(float(bias.abs().mean() / y.abs().mean()))

    layers = [module for module in model.modules() if isinstance(module, FlyLoraLinear)]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    model.eval()
    with torch.no_grad():
        for start in range(0, 32, 16):
            batch = collate(sorted(items, key=lambda i: len(i.input_ids))[start : start + 16])
            model(**{k: v for k, v in batch.items() if k != "labels"})
    for handle in handles:
        handle.remove()
    share = torch.stack(loads)
    return {
        "cv": float((share.std(dim=1, correction=0) / share.mean(dim=1)).mean()),
        "per_token": float(((share >= 0.01) & (share <= 0.99)).float().mean()),
        "bias_ratio": float(torch.tensor(ratios).median()),
    }


def run(args: argparse.Namespace, method: str, lr: float, rate: float, seed: int) -> dict[str, Any]:
    """One training from scratch; returns its record."""
    torch.manual_seed(seed)
    loaded = load_model(args.model, dtype="float32")
    task = load_task(args.task, data_dir=args.data_dir) if args.data_dir else load_task(args.task)
    length = args.max_length or task.max_length
    train = encode_all(task.examples("train"), loaded.tokenizer, length).items
    held_out = encode_all(task.examples("validation", limit=args.held_out), loaded.tokenizer, length).items
    if method == "flylora":
        config: Any = FlyLoraConfig(
            target_modules="all-linear", task_type="CAUSAL_LM", projection_seed=seed, balance_rate=rate,
            selection=args.selection,
        )  # fmt: skip
    else:
        r = int(method.removeprefix("lora"))
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, config)
    record: dict[str, Any] = {"before": answer_loss(model, held_out)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, max(1, args.steps * 3 // 100), args.steps)
    order = [i for epoch in range(99) for i in random.Random(f"{seed}-{epoch}").sample(range(len(train)), len(train))]
    started = time.monotonic()
    for step in range(args.steps):
        model.train()
        batch = collate([train[i] for i in order[step * args.batch_size : (step + 1) * args.batch_size]])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        print(
            f"\r{method} lr {lr:g} u {rate:g} step {step + 1}/{args.steps} loss {float(loss):.3f}", end="", flush=True
        )
    record["seconds"] = time.monotonic() - started
    record["after"] = answer_loss(model, held_out)
    if method == "flylora":
        record["routing"] = routing_statistics(model, held_out)
    print(f"\n{record}", flush=True)
    return record


def main() -> None:
    """Run the cells that have no record yet, then print them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", nargs="+", default=["flylora"], help="flylora, lora8, lora32, ...")
    parser.add_argument("--selection", default="magnitude")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--balance-rate", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--held-out", type=int, default=100)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        for method in args.method:
            for lr in args.lr:
                for rate in args.balance_rate if method == "flylora" else [0.0]:
                    settings = {
                        "task": Path(args.task).stem, "method": method, "lr": lr, "balance_rate": rate, "seed": seed,
                        "steps": args.steps, "batch_size": args.batch_size, "held_out": args.held_out,
                        "selection": args.selection,
                    }  # fmt: skip
                    name = "_".join(
                        f"{value:g}" if isinstance(value, float) else str(value) for value in settings.values()
                    )
                    path = args.out / f"{name}.json"
                    if path.exists():
                        continue
                    record = {**settings, **run(args, method, lr, rate, seed)}
                    path.with_suffix(".tmp").write_text(json.dumps(record, indent=1))
                    path.with_suffix(".tmp").replace(path)
    for path in sorted(args.out.glob("*.json")):
        record = json.loads(path.read_text())
        print(f"{path.stem:60s} {record['before']:.3f} -> {record['after']:.3f}  {record.get('routing', '')}")


if __name__ == "__main__":
    main()
