"""Statistics of a task's tokens, the least squares merge that uses them, and what flylora merge measures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import make_model
from flylora import UserError, functional
from flylora.adapter_folder import SavedAdapter, read_adapter
from flylora.lab.evaluation.retention import ItemLosses, retention
from flylora.lab.tasks import Example, Task
from flylora.merging import CalibrateConfig, MergeConfig, calibrate, merge_adapters
from flylora.merging.calibration import GramTable, _texts, gather, read_statistics, write_statistics
from flylora.merging.engine import MergeSpec, merge_to
from flylora.merging.layout import plan
from flylora.merging.merge import TABLE_NAME
from flylora.texts import IGNORED, Encoded
from reference import merging as reference
from saved_adapters import Save, fly, lora

Q = "model.layers.1.self_attn.q_proj"


def texts(count: int = 6) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(4, 260, (7 + i,), generator=generator).tolist()
        rows.append(Encoded(ids, [IGNORED] * 4 + ids[4:]))
    return rows


def pair(save: Save) -> list[SavedAdapter]:
    return [save("a", fly(projection_seed=1), 1), save("b", fly(projection_seed=2, r=6, k=3), 2)]


def inputs_of(model: nn.Module, module: str, rows: list[Encoded]) -> list[Tensor]:
    """The input of one module for each text alone, without padding."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
    handle.remove()
    return seen


def literal_codes(adapter: SavedAdapter, module: str, x: Tensor) -> Tensor:
    factors = adapter.with_in_features(adapter.factors(module))
    y = x @ factors.down().T
    return functional.routed_codes(y, functional.select(y, factors.routing_bias, factors.routing))


@pytest.mark.parametrize(("tokens", "part"), [("all", slice(None)), ("answer", slice(3, -1)), ("prompt", None)])
def test_statistics_are_the_codes_products_of_the_tokens_that_count(
    save: Save, tokens: str, part: slice | None
) -> None:
    adapters, rows = pair(save), texts()
    found = gather(make_model(), plan(adapters), rows, tokens, batch_size=4, quiet=True)  # type: ignore[arg-type]
    gram = torch.zeros(14, 14, dtype=torch.float64)
    count = 0
    for x in inputs_of(make_model(), Q, rows):
        z = torch.cat([literal_codes(adapter, Q, x) for adapter in adapters], dim=1).double()
        z = torch.cat([z[:3], z[-1:]]) if part is None else z[part]
        gram += z.T @ z
        count += len(z)
    torch.testing.assert_close(found.grams[Q].sum(0), gram, rtol=1e-5, atol=1e-6)
    assert float(found.tokens.sum()) == count
    assert (found.grams[Q][0] - found.grams[Q][1]).abs().max() > 0


def test_statistics_follow_the_adapter_that_runs(save: Save) -> None:
    adapters, rows = pair(save), texts()
    layout = plan(adapters)
    base = gather(make_model(), layout, rows, quiet=True)
    model = peft.PeftModel.from_pretrained(make_model(), str(adapters[0].path)).eval()
    running = gather(model, layout, rows, quiet=True)
    assert not torch.allclose(base.grams[Q], running.grams[Q])
    again = inputs_of(model, f"base_model.model.{Q}", rows)
    z = torch.cat([torch.cat([literal_codes(a, Q, x) for a in adapters], dim=1) for x in again]).double()
    torch.testing.assert_close(running.grams[Q].sum(0), z.T @ z, rtol=1e-4, atol=1e-5)


def test_no_hook_stays_and_nothing_is_changed(save: Save) -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gather(model, plan(pair(save)), texts(), quiet=True)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_statistics_survive_their_file_and_serve_a_part_of_the_adapters(save: Save, tmp_path: Path) -> None:
    a, b = pair(save)
    c = save("c", fly(projection_seed=3, target_modules=["q_proj"]), 3)
    rows = texts()
    whole = gather(make_model(), plan([c, a, b]), rows, quiet=True)
    write_statistics(tmp_path / "x.safetensors", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "x.safetensors"]
    read = read_statistics(tmp_path / "x.safetensors")
    layout = plan([a, b])
    alone = gather(make_model(), layout, rows, quiet=True)
    names = ["x.safetensors", "y"]
    found, expected = GramTable(layout, [read, read], names), GramTable(layout, [alone, alone], names)
    for half in (0, 1):
        torch.testing.assert_close(found.grams(0, Q)[half], expected.grams(0, Q)[half])
    assert found.share(0) == expected.share(0)
    with pytest.raises(UserError, match=r"x\.safetensors was not made for these adapters"):
        GramTable(plan([a, b, save("d", fly(projection_seed=9), 4)]), [read] * 3, ["x.safetensors"] * 3)


@pytest.mark.parametrize("kind", ["flylora", "lora", "shared"])
def test_the_merge_is_the_float64_solution_in_every_module(save: Save, tmp_path: Path, kind: str) -> None:
    if kind == "lora":
        adapters = [save("a", lora(r=3, lora_alpha=5), 1), save("b", lora(r=2, use_rslora=True), 2)]
    else:
        adapters = [save("a", fly(projection_seed=1), 1), save("b", fly(projection_seed=1 + (kind != "shared")), 2)]
    layout = plan(adapters)
    tasks = [gather(make_model(), layout, rows, quiet=True) for rows in (texts()[:3], texts()[3:])]
    table = GramTable(layout, tasks, ["x", "y"])
    report = merge_to(tmp_path / "out", adapters, MergeSpec("least_squares", ridge=0.05), table, quiet=True)
    merged = read_adapter(tmp_path / "out")
    for module in merged.modules:
        local = layout.at(module)
        ups = [
            local.place(t, adapter.factors(module).scaled_up()).double().numpy() for t, adapter in enumerate(adapters)
        ]
        grams = [(task.grams[module].sum(0) / task.tokens.sum()).numpy() for task in tasks]
        penalty = 0.05 * (0.5 * grams[0] + 0.5 * grams[1]).trace() / local.rank
        expected = reference.least_squares(ups, grams, [0.5, 0.5], (ups[0] + ups[1]) / 2, penalty)
        np.testing.assert_allclose(merged.factors(module).scaled_up().numpy(), expected, rtol=1e-3, atol=1e-4)
    assert len(report.objective) == len(layout.modules)
    assert all(ratio < 1 for ratio in report.objective.values())


def test_an_adapter_that_leaves_a_module_alone_wants_no_update_there(save: Save, tmp_path: Path) -> None:
    adapters = [save("a", fly(projection_seed=1), 1), save("b", fly(projection_seed=2, target_modules=["v_proj"]), 2)]
    layout = plan(adapters)
    tasks = [gather(make_model(), layout, rows, quiet=True) for rows in (texts()[:3], texts()[3:])]
    spec, table = MergeSpec("least_squares", ridge=1e-3), GramTable(layout, tasks, ["x", "y"])
    merge_to(tmp_path / "out", adapters, spec, table, quiet=True)
    up = adapters[0].factors(Q).scaled_up().double().numpy()
    own = layout.at(Q).place(0, torch.from_numpy(up)).numpy()
    grams = [(task.grams[Q].sum(0) / task.tokens.sum()).numpy() for task in tasks]
    penalty = 1e-3 * (0.5 * grams[0] + 0.5 * grams[1]).trace() / len(grams[0])
    expected = reference.least_squares([own, 0 * own], grams, [0.5, 0.5], own / 2, penalty)
    found = read_adapter(tmp_path / "out").factors(Q).scaled_up().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_no_counted_token_is_an_error(save: Save) -> None:
    rows = [Encoded([5, 6, 7], [IGNORED] * 3)]
    with pytest.raises(UserError, match="No token of the calibration texts counts"):
        gather(make_model(), plan(pair(save)), rows, "answer", quiet=True)


def test_a_model_without_the_modules_is_refused(save: Save) -> None:
    with pytest.raises(UserError, match=r"no module model\.layers\.1\.mlp\.down_proj"):
        gather(make_model(num_hidden_layers=1), plan(pair(save)), texts(), quiet=True)


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no calibration file"):
        read_statistics(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is no calibration file"):
        read_statistics(tmp_path / "other.safetensors")
    save_file({}, tmp_path / "new.safetensors", {"flylora_calibration": json.dumps({"format_version": 99})})
    with pytest.raises(UserError, match="format version 99"):
        read_statistics(tmp_path / "new.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="damaged or cut off"):
        read_statistics(tmp_path / "cut.safetensors")


# --- the commands on a tiny model and task


@pytest.fixture
def world(save: Save, tiny_model_dir: Path, tiny_task: Path) -> dict[str, Any]:
    adapters = [
        save("a", fly(projection_seed=1), 1, base=str(tiny_model_dir)),
        save("b", fly(projection_seed=2), 2, base=str(tiny_model_dir)),
    ]
    return {"adapters": [str(adapter.path) for adapter in adapters], "task": str(tiny_task)}


def test_calibrate_then_merge_is_merging_with_tasks(world: dict[str, Any], tmp_path: Path) -> None:
    files = [str(tmp_path / "1.safetensors"), str(tmp_path / "2.safetensors")]
    for file in files:
        calibrate(CalibrateConfig(world["adapters"], world["task"], file, texts=8, dtype="float32"))
    shared: dict[str, Any] = {"adapters": world["adapters"], "method": "least_squares", "dtype": "float32", "texts": 8}
    by_files = merge_adapters(MergeConfig(**shared, out=str(tmp_path / "x"), calibrate=files))
    by_tasks = merge_adapters(MergeConfig(**shared, out=str(tmp_path / "y"), calibrate=[world["task"]] * 2))
    assert by_files.adapter_fingerprint == by_tasks.adapter_fingerprint
    assert by_tasks.calibration[0]["texts"] == 8
    assert by_tasks.calibration[0]["run"] == "average"
    assert sum(by_tasks.parameters["ridge"].values()) == 6
    with pytest.raises(UserError, match="exists already"):
        calibrate(CalibrateConfig(world["adapters"], world["task"], files[0], texts=8))
    with pytest.raises(UserError, match="not files"):
        merge_adapters(MergeConfig(**shared, out=str(tmp_path / "z"), calibrate=files, rounds=2))


def test_a_second_round_runs_the_first_merge(world: dict[str, Any], tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "adapters": world["adapters"],
        "method": "least_squares",
        "dtype": "float32",
        "texts": 8,
        "calibrate": [world["task"]] * 2,
        "weights": [0.7, 0.3],
    }
    once = merge_adapters(MergeConfig(**shared, out=str(tmp_path / "x")))
    twice = merge_adapters(MergeConfig(**shared, out=str(tmp_path / "y"), rounds=2))
    assert once.adapter_fingerprint != twice.adapter_fingerprint
    files = []
    for t in (0, 1):
        files.append(str(tmp_path / f"{t}.safetensors"))
        calibrate(
            CalibrateConfig(
                world["adapters"], world["task"], files[t], texts=8, dtype="float32", run=str(tmp_path / "x")
            )
        )
    by_hand = merge_adapters(MergeConfig(**{**shared, "calibrate": files}, out=str(tmp_path / "z")))
    assert by_hand.adapter_fingerprint == twice.adapter_fingerprint


def test_evaluate_writes_a_table_that_says_what_was_kept(world: dict[str, Any], tmp_path: Path) -> None:
    record = merge_adapters(
        MergeConfig(world["adapters"], str(tmp_path / "out"), evaluate=[world["task"]] * 2, dtype="float32")
    )
    assert [row["task"] for row in record.evaluation] == ["letters", "letters"]
    row = record.evaluation[0]
    assert row["items"] == 8
    assert row["base"] == record.evaluation[1]["base"]
    assert row["merged"] == record.evaluation[1]["merged"]
    if row["retention"] is not None:
        assert row["retention"] == pytest.approx((row["base"] - row["merged"]) / (row["base"] - row["single"]))
    text = (tmp_path / "out" / TABLE_NAME).read_text()
    assert f"{row['merged']:.3f}" in text
    assert text.count("letters") == 2


def test_search_tunes_on_the_validation_split_and_reports_on_test(world: dict[str, Any], tmp_path: Path) -> None:
    tasks = [world["task"]] * 2
    options: dict[str, Any] = {"method": "sum", "search": True, "evaluate": tasks, "dtype": "float32"}
    record = merge_adapters(MergeConfig(world["adapters"], str(tmp_path / "out"), **options))
    best = max(record.search, key=lambda entry: entry["mean"])
    assert len(record.search) == 6
    assert [entry["weight"] for entry in record.inputs] == best["weights"]


def test_search_cannot_report_on_what_it_tuned(world: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "sum", "search": True, "evaluate": [world["task"]] * 2, "dtype": "float32"}
    with pytest.raises(UserError, match="evaluate on test"):
        merge_adapters(MergeConfig(world["adapters"], str(tmp_path / "out"), **options, eval_split="validation"))
    with pytest.raises(UserError, match="use sum"):
        merge_adapters(MergeConfig(world["adapters"], str(tmp_path / "out"), **{**options, "method": "average"}))
    assert not (tmp_path / "out").exists()


# --- retention


def test_retention_is_the_ratio_of_gains_with_a_jackknife_like_error() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 9, 400)
    base = rng.normal(2.0, 0.3, 400) * tokens
    single = base - rng.normal(1.0, 0.2, 400) * tokens
    merged = base - 0.8 * (base - single) + rng.normal(0, 0.3, 400)
    losses = [ItemLosses(values.tolist(), tokens.tolist()) for values in (base, single, merged)]
    found = retention(*losses)
    assert found is not None
    assert found[0] == pytest.approx((base - merged).sum() / (base - single).sum())
    draws = []
    for _ in range(500):
        picked = rng.integers(0, 400, 400)
        draws.append((base - merged)[picked].sum() / (base - single)[picked].sum())
    assert found[1] == pytest.approx(float(np.std(draws)), rel=0.15)


def test_nothing_gained_is_nothing_to_keep() -> None:
    same = ItemLosses([1.0, 2.0], [1, 2])
    assert retention(same, same, same) is None
    assert math.isclose(same.per_token, 1.0)


def test_calibration_texts_are_those_that_fit_and_more_begin_with_fewer(tokenizer: Any) -> None:
    letters = [Example(str(i), "p" * (3 + 7 * (i % 5)), "ok", "ok") for i in range(40)]
    task = Task(name="t", version="1", load=lambda split: letters, kind="generate", max_length=24)
    few, more = _texts(task, tokenizer, 4), _texts(task, tokenizer, 9)
    assert [len(few), len(more)] == [4, 9]
    assert more[:4] == few
    assert all(len(row.input_ids) <= 24 for row in more)
    assert len(_texts(task, tokenizer, 400)) == 24  # all that fit
    with pytest.raises(UserError, match="None of the 40 training examples"):
        _texts(dataclasses.replace(task, max_length=3), tokenizer, 4)
