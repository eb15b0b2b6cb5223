"""Run by ``nox --session wheel``, where the wheel is installed without the laboratory; pytest does not collect it.

Saves two adapters of a tiny model, merges them by the command and by the call, loads the result, and asks for a command
of the laboratory, which must name the missing extra.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import flylora


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["flylora", *words], capture_output=True, text=True)


def main() -> None:
    tiny_model().save_pretrained("base")
    for seed in (1, 2):
        config = flylora.FlyLoraConfig(r=8, k=2, projection_seed=seed, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(LlamaForCausalLM.from_pretrained("base"), config)
        for name, parameter in model.named_parameters():
            if "flylora_B" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(f"adapter{seed}")

    merged = command("merge", "adapter1", "adapter2", "--out", "merged")
    assert merged.returncode == 0, merged.stderr
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "merged").eval()
    assert torch.isfinite(loaded(torch.arange(8)[None]).logits).all()
    assert command("inspect", "merged").returncode == 0

    train = command("train", "--model", "base", "--task", "capitals", "--out", "run")
    assert train.returncode == 2, train.stderr
    assert "flylora[lab]" in train.stderr, train.stderr
    assert not Path("run").exists()
    print("The wheel works without the laboratory.")


if __name__ == "__main__":
    main()
