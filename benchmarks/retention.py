"""What merging keeps on a real model: FlyLoRA with own and with shared projections, and plain LoRA, by every method.

    python benchmarks/retention.py --model smollm2-135m --tasks configs/arc_easy.yaml configs/gsm8k.yaml \
        configs/code_alpaca.yaml --data-dir DATA --work DIR --out benchmarks/records/retention

Trains one adapter a task and family (DIR keeps them, and every loss that was measured, so that an interrupted run goes
on where it was), merges them, and measures the loss per answer token on the test split. Retention is
(base - merged) / (base - single), its standard error over items. Writes a JSON and a Markdown file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flylora.errors import UserError
from flylora.lab.evaluation.retention import ItemLosses, item_losses, retention
from flylora.lab.training import TrainConfig, train
from flylora.merging import CalibrateConfig, MergeConfig, calibrate, merge_adapters
from flylora.models import LoadedModel, load_model
from flylora.records import now, provenance

FAMILIES: dict[str, tuple[str, bool]] = {  # name: method, whether all tasks share one projection
    "flylora": ("flylora", False),
    "flylora, shared projection": ("flylora", True),
    "lora r 8": ("lora", False),
}
TEXTS = 32
GROWTH = (2, 4, 8, 16, 32, 64, 128)
LIMITED_RANK = 32


@dataclass(frozen=True)
class Setting:
    """What every part of the run needs."""

    arguments: argparse.Namespace
    tasks: list[Path]
    measured: list[Path]  # the same tasks with items as long as they are measured on
    loaded: LoadedModel

    @property
    def work(self) -> Path:
        return Path(self.arguments.work)

    @property
    def data_dir(self) -> str | None:
        return self.arguments.data_dir


def shortened(task: Path, folder: Path, max_length: int) -> Path:
    """A copy of a task file with another longest item, measured by its loss alone."""
    spec = yaml.safe_load(task.read_text())
    spec["max_length"] = max_length
    spec["kind"] = "loss"
    spec.pop("metric", None)
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / task.name
    out.write_text(yaml.safe_dump(spec, sort_keys=False))
    return out


def trained(setting: Setting, family: str) -> list[Path]:
    """One adapter a task."""
    method, shared = FAMILIES[family]
    given = setting.arguments
    folders = []
    for number, task in enumerate(setting.tasks):
        out = setting.work / "adapters" / f"{slug(family)}_{task.stem}"
        options: dict[str, Any] = {"projection_seed": 0 if shared else number + 1}
        if method == "lora":
            options = {"r": 8, "lora_alpha": 16}
        if not (out / "adapter_model.safetensors").exists():
            train(
                TrainConfig(
                    model=given.model,
                    task=str(task),
                    out=str(out),
                    method=method,
                    adapter=options,
                    data_dir=given.data_dir,
                    steps=given.steps,
                    lr=given.lr if method == "flylora" else given.lora_lr,
                    seed=given.seed,
                    resume=True,
                )
            )
        folders.append(out)
    return folders


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def losses(setting: Setting, key: str, adapter: Path | None, split: str = "test") -> list[ItemLosses]:
    """The losses on every task's items, measured once."""
    found = []
    length = setting.arguments.test_length
    for task in setting.measured:
        file = setting.work / "losses" / f"{slug(key)}-{task.stem}-{split}-{length}.json"
        if not file.exists():
            measured = item_losses(
                setting.loaded, adapter, str(task), split, setting.arguments.items, data_dir=setting.data_dir
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(dataclasses.asdict(measured)))
            partial.rename(file)
        found.append(ItemLosses(**json.loads(file.read_text())))
    return found


def statistics(setting: Setting, family: str, singles: Sequence[Path], texts: int, tokens: str) -> list[str]:
    """A calibration file a task."""
    files = []
    for task in setting.tasks:
        out = setting.work / "calibration" / f"{slug(family)}-{task.stem}-{texts}-{tokens}.safetensors"
        if not out.exists():
            calibrate(
                CalibrateConfig(
                    [str(path) for path in singles],
                    str(task),
                    str(out),
                    texts=texts,
                    tokens=tokens,  # type: ignore[arg-type]
                    data_dir=setting.data_dir,
                ),
                setting.loaded,
            )
        files.append(str(out))
    return files


def merges(setting: Setting, family: str, singles: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of every merge of a family."""
    full = family == next(iter(FAMILIES))
    tasks = [str(task) for task in setting.tasks]
    three = len(tasks)
    search = {"evaluate": tasks, "eval_limit": 2, "search": True, "search_limit": TEXTS}
    found: list[tuple[str, dict[str, Any]]] = [
        ("average", {"method": "average"}),
        ("sum, weight 0.6", {"method": "sum", "weights": [0.6] * three}),
        ("sum, weight 1", {"method": "sum", "weights": [1.0] * three}),
        ("sum, weight by search", {"method": "sum", **search}),
        ("ties", {"method": "ties"}),
        (f"ties, rank {LIMITED_RANK}", {"method": "ties", "rank": LIMITED_RANK}),
        ("magnitude_prune", {"method": "magnitude_prune"}),
        ("dare", {"method": "dare"}),
        ("dare_ties", {"method": "dare_ties"}),
        ("knots", {"method": "knots"}),
    ]
    if FAMILIES[family][1]:  # what works on B of a shared projection keeps its rank
        found = [(name, options) for name, options in found if "rank" not in options]
    for tokens in ("answer", "all", "prompt") if full else ("answer",):
        found.append(
            (
                f"least_squares, {tokens} tokens, {TEXTS} texts",
                {"method": "least_squares", "calibrate": ("files", TEXTS, tokens)},
            )
        )
    found.append(
        (
            f"least_squares, answer tokens, {TEXTS} texts, 2 rounds",
            {"method": "least_squares", "calibrate": tasks, "texts": TEXTS, "rounds": 2},
        )
    )
    for texts in GROWTH if full else ():
        if texts != TEXTS:
            found.append(
                (
                    f"least_squares, answer tokens, {texts} texts",
                    {"method": "least_squares", "calibrate": ("files", texts, "answer")},
                )
            )
    return found


def measure(
    setting: Setting, family: str, name: str, options: dict[str, Any], singles: Sequence[Path]
) -> dict[str, Any]:
    """Merge, measure, and the row of the table."""
    given = dict(options)
    if isinstance(given.get("calibrate"), tuple):
        _, texts, tokens = given["calibrate"]
        given["calibrate"] = statistics(setting, family, singles, texts, tokens)
    out = setting.work / "merged" / slug(f"{family} {name}")
    if not out.exists():
        config = MergeConfig([str(path) for path in singles], str(out), data_dir=setting.data_dir, **given)
        merge_adapters(config, setting.loaded)
    record = json.loads((out / "merge_record.json").read_text())
    base, single = (
        losses(setting, "base", None),
        [losses(setting, f"{family} single {t}", path)[t] for t, path in enumerate(singles)],
    )
    merged = losses(setting, f"{family} {name}", out)
    kept = [retention(b, s, m) for b, s, m in zip(base, single, merged, strict=True)]
    assert all(value is not None for value in kept)
    pairs = [value for value in kept if value is not None]
    return {
        "family": family,
        "merge": name,
        "retention": [list(pair) for pair in pairs],
        "mean": sum(value for value, _ in pairs) / len(pairs),
        "stderr": sum(error**2 for _, error in pairs) ** 0.5 / len(pairs),
        "merged_loss": [m.per_token for m in merged],
        "weights": [item["weight"] for item in record["inputs"]],
        "parameters": record["parameters"],
        "measured": record["measured"],
        "calibration_tokens": [task["token_count"] for task in record["calibration"]],
        "seconds": record["seconds"],
    }


def markdown(result: dict[str, Any]) -> str:
    """One table of losses and one of what was kept."""
    names = result["tasks"]
    counts = ", ".join(f"{name} {count}" for name, count in zip(names, result["items"], strict=True))
    lines = [
        "# Retention",
        "",
        f"{result['about']} Items: {counts}.",
        "",
        "| loss per answer token | " + " | ".join(names) + " |",
    ]
    lines += ["| --- |" + " --- |" * len(names)]
    for who, values in result["losses"].items():
        lines.append(f"| {who} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    lines += [
        "",
        "| family | merge | mean | " + " | ".join(names) + " |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['family']} | {row['merge']} | refused: {row['error']} |" + " |" * len(names))
            continue
        cells = " | ".join(f"{value:.3f} ± {error:.3f}" for value, error in row["retention"])
        lines.append(f"| {row['family']} | {row['merge']} | {row['mean']:.3f} ± {row['stderr']:.3f} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", type=Path, nargs="+", required=True, help="task files")
    parser.add_argument("--data-dir")
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON and Markdown, with .json and .md appended")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--items", type=int, default=48, help="test items of each task")
    parser.add_argument("--max-length", type=int, default=128, help="longest item to train and calibrate on")
    parser.add_argument("--test-length", type=int, default=320, help="longest item to measure on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work = Path(arguments.work)
    loaded = load_model(arguments.model)
    tasks = [shortened(task, work / "tasks", arguments.max_length) for task in arguments.tasks]
    measured = [shortened(task, work / "tasks" / "measured", arguments.test_length) for task in arguments.tasks]
    setting = Setting(arguments, tasks, measured, loaded)
    result: dict[str, Any] = {
        "about": (
            f"{arguments.model}, {arguments.steps} steps of 8 items of at most {arguments.max_length} tokens, learning "
            f"rate {arguments.lr:g} (LoRA {arguments.lora_lr:g}), seed {arguments.seed}; at most {arguments.items} "
            f"test items a task, of at most {arguments.test_length} tokens. Retention is (base - merged) / "
            "(base - single) of the loss, with its standard error "
            "over items."
        ),
        "options": {
            key: str(value) for key, value in vars(arguments).items() if key not in ("work", "out", "data_dir")
        },
        "provenance": dataclasses.asdict(
            provenance(seeds={"seed": arguments.seed}, data_sha256={}, model_sha256=loaded.sha256)
        ),
        "tasks": [task.stem for task in tasks],
        "items": [len(one.sums) for one in losses(setting, "base", None)],
        "losses": {"base": [one.per_token for one in losses(setting, "base", None)]},
        "rows": [],
    }
    for family in arguments.families:
        singles = trained(setting, family)
        own = [losses(setting, f"{family} single {t}", path)[t].per_token for t, path in enumerate(singles)]
        result["losses"][family] = own
        for name, options in merges(setting, family, singles):
            try:
                row = measure(setting, family, name, options, singles)
            except UserError as error:
                result["rows"].append({"family": family, "merge": name, "error": str(error)})
                print(family, name, error, flush=True)
                continue
            result["rows"].append(row)
            print(f"{family:28s} {name:50s} {row['mean']:.3f} ± {row['stderr']:.3f}", flush=True)
            result["finished"] = now()
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
            arguments.out.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
