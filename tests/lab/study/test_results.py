"""Figures against numbers worked out by hand, from records written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flylora.lab.study import Study, load_study
from flylora.lab.study.results import Condition, Figure, Results, collect, item_error, metrics, verdict
from flylora.lab.study.tables import write_tables
from lab.study.handmade import evaluation

Save = Callable[..., Path]


def collected(study: Study, tmp_path: Path) -> Results:
    return collect(study, tmp_path / "run")


FLY = "llama/fly/vowels/eval-vowels"
LORA = "llama/lora/vowels/eval-vowels"
AT_FLY = Condition("llama", "fly", "", "vowels", "vowels")


# Two-sided 95 % points of Student's t, as printed in statistical tables, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize("freedom", STUDENT)
def test_intervals_are_those_of_the_tables(freedom: int) -> None:
    figure = Figure(AT_FLY, "loss", dict(enumerate([1.0, -1.0, *[0.0] * (freedom - 1)])))
    assert figure.interval is not None
    assert figure.deviation is not None
    low, high = figure.interval
    assert low == -high
    assert high * math.sqrt(figure.n) / figure.deviation == pytest.approx(STUDENT[freedom], abs=5e-4)


def test_mean_deviation_and_interval() -> None:
    figure = Figure(AT_FLY, "loss", {0: 1.0, 1: 2.0, 2: 6.0})
    assert (figure.mean, figure.n) == (3.0, 3)
    assert figure.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))  # sample, not population
    half = 4.3027 * math.sqrt(7) / math.sqrt(3)
    assert figure.interval == pytest.approx((3 - half, 3 + half), abs=1e-3)
    alone = Figure(AT_FLY, "loss", {0: 2.0})
    assert (alone.mean, alone.deviation, alone.interval, alone.n) == (2.0, None, None, 1)


def test_means_deviations_and_paired_differences(save: Save, put: Callable[..., None], tmp_path: Path) -> None:
    study = load_study(save(seeds=[0, 1, 2]))
    for seed, (fly, lora) in enumerate([(1.0, 1.2), (1.1, 1.5), (1.5, 1.6)]):
        put(f"seed{seed}/{FLY}", evaluation([fly, fly]))
        put(f"seed{seed}/{LORA}", evaluation([lora, lora]))
    results = collected(study, tmp_path)
    loss = results.at(AT_FLY, "loss")
    assert loss is not None
    assert (loss.mean, loss.n) == (pytest.approx(1.2), 3)
    assert loss.deviation == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    (difference,) = results.differences
    assert difference.values == pytest.approx({0: -0.2, 1: -0.4, 2: -0.1})
    assert difference.mean == pytest.approx(-0.7 / 3)
    deviation = math.sqrt(((0.1 / 3) ** 2 + (0.5 / 3) ** 2 + (0.4 / 3) ** 2) / 2)
    assert difference.deviation == pytest.approx(deviation)
    half = 4.30265 * deviation / math.sqrt(3)
    assert difference.interval == pytest.approx((-0.7 / 3 - half, -0.7 / 3 + half), abs=1e-4)
    assert verdict(difference) == "not told apart"  # the interval holds 0, though every seed agrees


def test_differences_are_taken_at_shared_seeds_alone(save: Save, put: Callable[..., None], tmp_path: Path) -> None:
    study = load_study(save(seeds=[0, 1]))
    put(f"seed0/{FLY}", evaluation([1.0, 1.0]))
    put(f"seed1/{FLY}", evaluation([9.0, 9.0]))
    put(f"seed0/{LORA}", evaluation([2.0, 2.0]))
    results = collected(study, tmp_path)
    (difference,) = results.differences
    assert difference.values == {0: -1.0}
    assert verdict(difference) == "one seed: no interval"
    text = (write_tables(study, tmp_path / "run"), (tmp_path / "run/results.md").read_text())[1]
    row = next(line for line in text.splitlines() if line.startswith("| fly | vowels: loss"))
    assert row.split(" | ")[2:5] == ["1", "-1.000", "–"]
    assert "one seed: no interval" in row


@pytest.mark.parametrize(
    ("metric", "values", "error", "said"),
    [
        ("loss", (-0.2, -0.21, -0.19), 0.09, "better"),
        ("loss", (0.2, 0.21, 0.19), 0.09, "worse"),
        ("loss", (0.2, 0.21, 0.19), 0.11, "not told apart"),
        ("accuracy", (2.0, 2.1, 1.9), 0.9, "better"),
        ("points_lost", (2.0, 2.1, 1.9), None, "worse"),
        ("retention", (-0.2, -0.21, -0.19), None, "worse"),
        ("accuracy", (2.0, -2.1, 1.9), 0.1, "not told apart"),
        ("accuracy", (-1.5625, -1.5625, -1.5625), 3.3, "not told apart"),  # one item of 64 at every seed
    ],
)
def test_verdicts(metric: str, values: tuple[float, ...], error: float | None, said: str) -> None:
    assert verdict(Figure(AT_FLY, metric, dict(enumerate(values)), item_error=error)) == said


def test_errors_over_items() -> None:
    # Two seeds; item sums of differences (nats): 1 token: -0.1 and -0.3, mean -0.2; 2 tokens: 2 * (0.2, 0.0), mean 0.2.
    pairs = [
        (evaluation([1.0, 1.2], [1.0, 0.0]), evaluation([1.1, 1.0], [0.0, 0.0])),
        (evaluation([1.0, 1.0], [1.0, 1.0]), evaluation([1.3, 1.0], [0.0, 0.0])),
    ]
    # The ratio is (-0.2 + 0.2) / 3 = 0, so the residuals are the sums: sqrt(2 / 1 * (0.04 + 0.04)) / 3.
    assert item_error("loss", pairs) == pytest.approx(math.sqrt(2 * 0.08) / 3)
    # Accuracy differences 100 and 50 points: deviation 25 * sqrt(2) over sqrt(2) items.
    assert item_error("accuracy", pairs) == pytest.approx(25.0)
    assert item_error("retention", pairs) is None
    assert item_error("loss", [(evaluation([1.0]), evaluation([2.0]))]) is None


def test_retention_and_points_lost_of_merges(save: Save, put: Callable[..., None], tmp_path: Path) -> None:
    study = load_study(save())
    for task, merged, score in (("vowels", 1.5, 0.5), ("others", 1.75, 0.0)):
        put(f"base/llama/{task}/eval-{task}", evaluation([2.0, 2.0], [0.0, 0.0]))
        put(f"seed0/llama/fly/{task}/eval-{task}", evaluation([1.0, 1.0], [1.0, 1.0]))
        put(f"seed0/llama/fly/merge-average/eval-{task}-{task}", evaluation([merged, merged], [2 * score, 0.0]))
    put("seed0/llama/fly/merge-average/merge", result={"routed": True})
    results = collected(study, tmp_path)
    condition = Condition("llama", "fly", "average", "vowels", "vowels")
    kept, lost = results.at(condition, "retention"), results.at(condition, "points_lost")
    assert kept is not None
    assert lost is not None
    assert (kept.values, lost.values) == ({0: pytest.approx(0.5)}, {0: pytest.approx(50.0)})
    mean = results.at(Condition("llama", "fly", "average"), "retention")
    assert mean is not None
    assert mean.values == {0: pytest.approx((0.5 + 0.25) / 2)}
    write_tables(study, tmp_path / "run")
    text = (tmp_path / "run/results.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| fly | average"))
    assert [cell.strip() for cell in row.strip("| ").split("|")[2:5]] == ["routed", "1", "0.375"]


def test_a_mean_over_some_tasks_only_is_none(save: Save, put: Callable[..., None], tmp_path: Path) -> None:
    study = load_study(save())
    for task in ("vowels", "others"):
        put(f"base/llama/{task}/eval-{task}", evaluation([2.0, 2.0]))
        put(f"seed0/llama/fly/{task}/eval-{task}", evaluation([1.0, 1.0]))
    put("seed0/llama/fly/merge-average/eval-vowels-vowels", evaluation([1.5, 1.5]))
    assert collected(study, tmp_path).at(Condition("llama", "fly", "average"), "retention") is None


def test_papers_figures_stand_beside_the_same_setup_alone(
    save: Save, content: dict[str, Any], put: Callable[..., None], tmp_path: Path
) -> None:
    name = content["models"]["llama"]["name"]
    paper = {
        "source": "a paper",
        "setup": {"models": {"llama": name}, "train": {"steps": 2}, "methods": {"fly": {"k": 2}}},
        "figures": [{"model": "llama", "method": "fly", "values": {"vowels": 77.5}}],
    }
    put(f"seed0/{FLY}", evaluation([1.0, 1.0], [1.0, 0.0]))

    def figure(**changes: Any) -> float | None:
        results = collected(load_study(save(**{"paper": paper, "evaluation": {}, **changes})), tmp_path)
        at = results.at(AT_FLY, "accuracy")
        assert at is not None
        return at.paper

    assert figure() == 77.5
    assert figure(evaluation={"limit": 3}) is None
    assert figure(evaluation={"split": "validation"}) is None
    assert figure(train={"steps": 3}) is None
    assert figure(train={"steps": 2, "train_limit": 5}) is None
    assert figure(models={"llama": {"name": "another"}}) is None
    methods = {**content["methods"], "fly": {"method": "flylora", "adapter": {"k": 1}}}
    assert figure(methods=methods) is None
    write_tables(load_study(save(paper=paper, evaluation={})), tmp_path / "run")
    text = (tmp_path / "run/results.md").read_text()
    assert "50.00 (paper: 77.5)" in text
    assert "Source: a paper." in text


def test_metrics_of_code_are_its_rates() -> None:
    rates = {"pass@10": 0.5, "pass@1": 0.25, "strict": 1.0}
    values = metrics(evaluation([1.0], [0.25], accuracies=rates))
    assert values == {"loss": 1.0, "pass@1": 25.0, "pass@10": 50.0}
    assert list(values) == ["loss", "pass@1", "pass@10"]
    assert metrics(evaluation([1.0], [0.25], accuracies={"strict": 1.0})) == {"loss": 1.0, "accuracy": 25.0}
