"""Bytes kept for backward, peak memory, adapter file and optimizer state, beside PEFT LoRA.

    python -m benchmarks memory --model smollm2-135m --out benchmarks/records/performance/memory

Kept bytes are those of the distinct storages that autograd saves in one forward pass, less the model's own tensors and
less what the frozen base alone saves. Each variant's peak is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import base_model, common_options, environment, random_tokens, table, variant, write
from benchmarks.step_cost import step

VARIANTS = ["base", "lora:8", "lora:32", "flylora:32:8", "flylora:32:8:4"]


def saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes of the distinct storages that a training forward saves, without those of the model's own tensors."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        own |= {t.untyped_storage().data_ptr() for t in getattr(module, "flylora_A", {}).values()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    inner: Any = model
    embeds = inner.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inner(inputs_embeds=embeds, labels=ids, use_cache=False)
    return sum(kept.values())


def one(words: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one variant, in this process."""
    base = base_model(options.model, options.dtype, options.device, options.layers)
    ids = random_tokens(base, options.tokens // options.length, options.length, options.device)
    model = variant(base, words)
    figures: dict[str, Any] = {"saved_bytes": saved_bytes(model, ids)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(model, ids)()
    if options.device.startswith("cuda"):
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    else:
        figures["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        figures["peak_before_bytes"] = 1024 * before
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    figures["trained_parameters"] = sum(parameter.numel() for parameter in trained)
    # AdamW keeps two numbers a trained parameter, of its own dtype.
    figures["optimizer_bytes"] = sum(2 * parameter.numel() * parameter.element_size() for parameter in trained)
    if words != "base":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # type: ignore[operator]
            figures["file_bytes"] = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return figures


def main() -> None:
    parser = common_options(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--length", type=int, default=128, help="tokens of one item")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options)))
        return
    same = [
        word
        for name in ("model", "device", "dtype", "tokens", "length")
        for word in (f"--{name}", str(getattr(options, name)))
    ]
    if options.layers:
        same += ["--layers", str(options.layers)]
    variants = {}
    for words in dict.fromkeys(["base", "lora:8", *options.variants]):
        command = [sys.executable, "-m", "benchmarks", "memory", *same, "--one", words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        variants[words] = json.loads(done.stdout.strip().splitlines()[-1])
    base, lora = variants["base"], variants["lora:8"]
    beyond = lora["saved_bytes"] - base["saved_bytes"]
    rows = []
    for words, figures in variants.items():
        kept = figures["saved_bytes"] - base["saved_bytes"]
        figures["saved_beyond_base"], figures["saved_ratio_to_lora_8"] = kept, kept / beyond
        rows.append(
            [
                words,
                f"{kept / 1e6:.1f}",
                f"{kept / beyond:.3f}",
                f"{figures['peak_bytes'] / 1e6:.0f}",
                f"{figures.get('file_bytes', 0) / 1e6:.2f}",
                f"{figures['optimizer_bytes'] / 1e6:.2f}",
            ]
        )
    lora_file = variants.get("lora:32", {}).get("file_bytes")
    ours = variants.get("flylora:32:8", {}).get("file_bytes")
    result = {
        "model": options.model,
        "dtype": options.dtype,
        "tokens": options.tokens,
        **environment(options.device),
        "variants": variants,
        "file_ratio_to_lora_of_the_same_r": ours / lora_file if ours and lora_file else None,
    }
    head = [
        "variant",
        "kept for backward beyond the base, MB",
        "ratio to LoRA r 8",
        "peak, MB",
        "file, MB",
        "AdamW, MB",
    ]
    text = f"{options.model}, {options.dtype}, {options.tokens} tokens\n\n{table(head, rows)}"
    if result["file_ratio_to_lora_of_the_same_r"]:
        text += f"\nFile of FlyLoRA r 32 to that of LoRA r 32: {result['file_ratio_to_lora_of_the_same_r']:.3f}.\n"
    write(options.out, result, text)


if __name__ == "__main__":
    main()
