"""Parameter counts: by hand on small layers, and the paper's Table 1 for Llama-3.1-8B's shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from flylora import FlyLoraConfig, UserError
from flylora.lab.baselines import LoriConfig, SplitLoraConfig
from flylora.lab.baselines.counts import count_adapter, count_parameters
from lab.baselines.small import CONFIGS, config
from tiny_models import llama

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama_8b() -> nn.Module:
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(shape)


INPUTS, OUTPUTS = 32 * 38912, 32 * 43008  # of all adapted layers: 6 x 4096 + 14336 and 4 x 4096 + 2 x 1024 + ...
TABLE_1: list[tuple[PeftConfig, str, int, int]] = [
    (LoraConfig(r=8, target_modules=PROJECTIONS), "0.26", 8 * (INPUTS + OUTPUTS), 8 * (INPUTS + OUTPUTS)),
    (LoraConfig(r=32, target_modules=PROJECTIONS), "1.03", 32 * (INPUTS + OUTPUTS), 32 * (INPUTS + OUTPUTS)),
    (
        SplitLoraConfig(r=32, experts=4, target_modules=PROJECTIONS),
        "0.33",
        32 * (INPUTS + OUTPUTS) + 4 * INPUTS,
        8 * (INPUTS + OUTPUTS) + 4 * INPUTS,
    ),
    (FlyLoraConfig(target_modules=PROJECTIONS), "0.13", 32 * OUTPUTS, 8 * OUTPUTS),
]


@pytest.mark.parametrize(("method", "percent", "trained", "active"), TABLE_1, ids=["r8", "r32", "split", "flylora"])
def test_the_papers_table_1(method: PeftConfig, percent: str, trained: int, active: int, llama_8b: nn.Module) -> None:
    count = count_parameters(method, llama_8b)
    assert count.base == 8_030_261_248
    assert f"{count.paper_percent:.2f}" == percent
    assert (count.trained, count.active) == (trained, active)
    assert count.active_percent == pytest.approx(100 * active / (8_030_261_248 + active))
    assert not any("lora" in name for name, _ in llama_8b.named_modules())  # left as it was


def meta_llama(**changes: Any) -> nn.Module:
    with torch.device("meta"):
        return llama(**changes)


# q is 32 -> 32 and v is 32 -> 16, in two layers each: n = 128 and m = 96 in all.
BY_HAND: dict[str, tuple[int, float]] = {
    "droplora": (4 * 224, 4 * 224),
    "hydralora": (3 * 128 + 3 * (3 * 96 + 128), 3 * 128 + 3 * (3 * 96 + 128)),
    "lori": (4 * 96, 96),  # a quarter of B is kept
    "sora": (4 * 224 + 4 * 4, 4 * 224 + 4 * 4),  # and four gates in each of four layers
    "splitlora": (8 * 224 + 4 * 128, 4 * 224 + 4 * 128),
}


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_the_baselines_counted_by_hand(method: str) -> None:
    count = count_parameters(config(method), meta_llama())
    assert (count.trained, count.active) == BY_HAND[method]
    live = get_peft_model(llama(), config(method))
    assert count_adapter(live, count.base) == count
    assert sum(p.numel() for p in live.parameters() if p.requires_grad) == count.trained


@pytest.mark.parametrize(
    ("changes", "trained", "active"),
    [
        ({"r": 8, "k": 2}, 8 * 96, 2 * 96),
        ({"r": 8, "k": 8}, 8 * 96, 8 * 96),
        ({"r": 8, "k": 2, "selection": "all"}, 8 * 96, 8 * 96),
        ({"r": 8, "k": 2, "projection_training": "trained"}, 8 * 224, 2 * 224),
        ({"r": 8, "k": 2, "rank_pattern": {"v_proj": 4}}, 8 * 64 + 4 * 32, 2 * 96),
    ],
    ids=str,
)
def test_flylora_counted_by_hand(changes: dict[str, Any], trained: int, active: int) -> None:
    count = count_parameters(FlyLoraConfig(target_modules=["q_proj", "v_proj"], **changes), meta_llama())
    assert (count.trained, count.active) == (trained, active)


def test_other_modules_that_train_are_counted_too() -> None:
    plain = count_parameters(FlyLoraConfig(target_modules=["q_proj"]), meta_llama())
    head = count_parameters(FlyLoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), meta_llama())
    assert (head.trained - plain.trained, head.active - plain.active) == (32 * 64, 32 * 64)


@pytest.mark.parametrize(
    "method",
    [LoraConfig(r=4, use_dora=True), AdaLoraConfig(init_r=4, total_step=10), VeraConfig(r=4)],
    ids=lambda method: type(method).__name__,
)
def test_a_method_of_pefts_is_counted_as_peft_prints_it(method: PeftConfig) -> None:
    method.target_modules = {"q_proj", "v_proj"}
    count = count_parameters(method, meta_llama())
    trained, total = get_peft_model(llama(), method).get_nb_trainable_parameters()
    assert count.trained == count.active == count.paper_active == trained
    assert total >= count.base + trained


def test_dense_lori_is_all_of_b() -> None:
    count = count_parameters(LoriConfig(r=4, target_modules=["q_proj", "v_proj"]), meta_llama())
    assert count.trained == count.active == 4 * 96


def test_a_model_with_weights_is_refused() -> None:
    with pytest.raises(UserError, match="build it under"):
        count_parameters(FlyLoraConfig(), llama())
