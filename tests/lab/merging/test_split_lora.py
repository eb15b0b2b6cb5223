"""Merging Split-LoRA adapters, whose every group of experts keeps its trained router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flylora import UserError
from flylora.adapter_folder import read_adapter
from flylora.lab.show import show_merge
from saved_adapters import Save, assert_same_outputs, fly, lora, merge, outputs, split, weighted


@pytest.mark.parametrize(("method", "weights"), [("average", [0.25, 0.5, 0.25]), ("sum", [1.5, -0.5, 2.0])])
def test_a_merge_is_the_weighted_sum_of_the_outputs(
    save: Save, tmp_path: Path, method: str, weights: list[float]
) -> None:
    adapters = [save("a", split(), 1), save("b", split(alpha=3), 2), save("c", split(r=16, experts=8, groups=2), 3)]
    record = merge(tmp_path / "out", adapters, method, weights=weights)
    parts = [outputs(adapter.path) for adapter in adapters]
    assert_same_outputs(outputs(tmp_path / "out"), weighted(parts, weights))
    assert (record.exact, record.routed) == (True, True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["experts"], config["groups"], config["k"]) == (32, 16, 4, 2)


def test_the_table_says_what_was_merged(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, config, said in (
        ("split", split, "Split-LoRA, every input's routing kept"),
        ("fly", fly, " FlyLoRA, every input's routing kept"),
        ("lora", lora, "plain LoRA"),
    ):
        show_merge(merge(tmp_path / f"{name}-out", [save(name, config(), 1), save(f"{name}2", config(), 2)]))
        assert said in capsys.readouterr().out


def test_one_router_over_all_experts_would_not_do(save: Save, tmp_path: Path) -> None:
    adapters = [save("a", split(), 1), save("b", split(), 2)]
    merge(tmp_path / "out", adapters)
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "groups": 1, "k": 4}))
    with pytest.raises(AssertionError):
        assert_same_outputs(
            outputs(tmp_path / "out"), weighted([outputs(adapter.path) for adapter in adapters], [0.5, 0.5])
        )


def test_a_merge_can_be_merged_again(save: Save, tmp_path: Path) -> None:
    adapters = [save(name, split(), seed) for seed, name in enumerate("abc")]
    merge(tmp_path / "two", adapters[:2])
    two = read_adapter(tmp_path / "two", ("splitlora",))
    merge(tmp_path / "three", [two, adapters[2]], weights=[2.0, 1.0])
    parts = [outputs(adapter.path) for adapter in adapters]
    assert_same_outputs(outputs(tmp_path / "three"), weighted(parts, [1 / 3] * 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ties"}, "Split-LoRA adapters can be merged by average or sum alone"),
        ({"method": "least_squares", "calibrate": ["capitals", "elements"]}, "by average or sum alone"),
        ({"rank": 4}, "by average or sum alone, without a rank"),
    ],
)
def test_other_methods_are_refused_and_leave_nothing(
    save: Save, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    adapters = [save("a", split(), 1), save("b", split(), 2)]
    with pytest.raises(UserError, match=message):
        merge(tmp_path / "out", adapters, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_what_does_not_fit_together_is_refused(save: Save, tmp_path: Path) -> None:
    first = save("a", split(), 1)
    for name, config, message in (
        ("k", split(k=1), "experts of different rank, number or k"),
        ("experts", split(experts=2), "experts of different rank, number or k"),
        ("modules", split(target_modules=["q_proj"]), "adapt different modules"),
        ("fly", fly(), "they do not route alike, so merge each kind on its own"),
    ):
        with pytest.raises(UserError, match=message):
            merge(tmp_path / "out", [first, save(name, config, 2)])


def test_a_damaged_file_is_told(save: Save, tmp_path: Path) -> None:
    adapter = save("a", split(), 1)
    path = adapter.path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 16}))
    with pytest.raises(UserError, match="config and weights do not belong together"):
        merge(tmp_path / "out", [adapter])


def test_it_is_no_adapter_to_export(save: Save) -> None:
    adapter = save("a", split(), 1)
    with pytest.raises(UserError, match="is a SPLITLORA adapter, but only FlyLoRA and LoRA adapters can be used here"):
        read_adapter(adapter.path)
