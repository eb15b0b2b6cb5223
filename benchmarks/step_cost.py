"""Seconds of a training step (forward and backward) and what the adapter adds to the frozen model's.

    python -m benchmarks step_cost --model smollm2-135m --out benchmarks/records/performance/step_cost

The overhead is step - frozen step of the same repetition; the frozen step has gradients to its inputs, as every adapted
layer but the first needs them. --curve tokens, r or blocks repeats it over a range, on --layers decoder layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.measure import (
    base_model,
    common_options,
    environment,
    interleaved,
    ratio,
    spread,
    table,
    variant,
    write,
)
from flylora.kernels import cpu as native

CURVES: dict[str, list[int]] = {
    "tokens": [128, 256, 512, 1024, 2048, 4096],
    "r": [8, 16, 32, 64, 128],
    "blocks": [1, 2, 4, 8, 16],
}


def step(model: nn.Module, ids: torch.Tensor, head: bool = True, compiled: bool = False) -> Callable[[], None]:
    """One forward and backward over all tokens; without the head, from the last hidden states alone."""
    model.train()
    inner: Any = model
    embed = inner.get_input_embeddings()
    body = None if head else inner.get_submodule("base_model.model.model" if hasattr(inner, "peft_config") else "model")

    if compiled:
        (body or model).compile(fullgraph=True)

    def run() -> None:
        embeds = embed(ids).detach().requires_grad_()
        if body is None:
            model(inputs_embeds=embeds, labels=ids, use_cache=False).loss.backward()
        else:
            hidden = body(inputs_embeds=embeds, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        for parameter in model.parameters():
            parameter.grad = None

    return run


def compare(
    base: nn.Module, words: list[str], tokens: int, repetitions: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of every variant, and overheads as ratios to each LoRA among them."""
    vocabulary = base.get_submodule("model.embed_tokens").num_embeddings
    length, device = min(options.length, tokens), options.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(vocabulary), (tokens // length, length), generator=generator).to(device)
    models = {name: variant(base, name) for name in ["base", *words]}
    functions = {name: step(model, ids, not options.body, options.compile) for name, model in models.items()}
    seconds = interleaved(functions, repetitions, device)
    result: dict[str, Any] = {"tokens": ids.numel(), "seconds": {n: spread(v) for n, v in seconds.items()}}
    result["overhead_seconds"] = {
        name: spread([a - b for a, b in zip(seconds[name], seconds["base"], strict=True)]) for name in words
    }
    result["overhead_ratio"] = {
        name: {
            other: ratio(seconds[name], seconds[other], seconds["base"]) for other in words if other.startswith("lora")
        }
        for name in words
        if not name.startswith("lora")
    }
    result["all_seconds"] = seconds
    return result


def rows_of(result: dict[str, Any], label: str = "") -> list[list[str]]:
    rows = []
    for name, found in result["seconds"].items():
        over = result["overhead_seconds"].get(name)
        ratios = result["overhead_ratio"].get(name, {})
        rows.append(
            [
                *([label] if label else []),
                name,
                f"{found['median']:.3f} ({found['quartile_1']:.3f} to {found['quartile_3']:.3f})",
                "" if over is None else f"{over['median']:.3f}",
                ", ".join(f"{middle:.2f} ({low:.2f} to {high:.2f}) {o}" for o, (middle, low, high) in ratios.items()),
            ]
        )
    return rows


HEAD = ["variant", "seconds a step (quartiles)", "overhead, seconds", "overhead as a ratio (95% interval) to"]


def curve(name: str, options: argparse.Namespace, base: nn.Module) -> list[tuple[int, dict[str, Any]]]:
    """The comparison at every point of a range."""
    found = []
    for value in CURVES[name]:
        tokens, words = options.tokens, list(options.variants)
        if name == "tokens":
            tokens = value
        elif name == "r":
            words = [f"lora:{value}", f"flylora:{value}:{max(1, value // 4)}"]
        else:
            words = ["lora:8", f"lora:{32 * value}", f"flylora:32:8:{value}"]
        repetitions = max(5, options.repetitions * 512 // max(512, tokens))
        found.append((value, compare(base, words, tokens, repetitions, options)))
        print(name, value, found[-1][1]["overhead_ratio"], flush=True)
    return found


def main() -> None:
    parser = common_options(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--length", type=int, default=128, help="tokens of one item")
    parser.add_argument("--variants", nargs="+", default=["lora:8", "lora:32", "flylora:32:8"])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--body", action="store_true", help="without the language model's head")
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) every variant")
    parser.add_argument("--curve", choices=list(CURVES))
    parser.add_argument("--plain", action="store_true", help="without the native kernel, where it is compiled")
    options = parser.parse_args()
    if options.plain:
        native.disable()
    model, _ = base_model(options.model, options.dtype, options.device, options.layers)
    about = {
        "model": options.model,
        "layers": options.layers,
        "dtype": options.dtype,
        "compiled": options.compile,
        **environment(options.device),
    }
    if options.curve is None:
        found = compare(model, options.variants, options.tokens, options.repetitions, options)
        result, text = {**about, **found}, table(HEAD, rows_of(found))
    else:
        points = curve(options.curve, options, model)
        result = {**about, "curve": options.curve, "points": [{options.curve: v, **found} for v, found in points]}
        text = table([options.curve, *HEAD], [row for v, found in points for row in rows_of(found, str(v))])
    part = f"{options.layers or 'all'} layers{' without the head' if options.body else ''}"
    title = (
        f"{options.model}, {options.dtype}, {part}, {about['threads']} threads, "
        f"{'native kernel' if about['native_kernel'] and not options.compile else 'plain PyTorch'}"
        f"{', compiled' if options.compile else ''}"
    )
    write(options.out, result, f"{title}\n\n{text}")


if __name__ == "__main__":
    main()
