"""The README.md of a trained adapter."""

from __future__ import annotations

from flylora.lab.training.config import TrainConfig
from flylora.lab.training.methods import needs_flylora
from flylora.lab.training.presets import preset
from flylora.lab.training.record import TrainRecord


def model_card(config: TrainConfig, record: TrainRecord) -> str:
    """The card in Markdown: what was trained on what, and how to load it."""
    name = preset(config.method).kind.upper()
    needs = f"import flylora  # makes {name} known to PEFT; without it loading stops with KeyError: '{name}'\n"
    return f"""---
library_name: peft
tags:
- {config.method.lower()}
---

# {config.method.lower()} adapter for {config.model}, trained on {record.task["name"]}

| | |
| --- | --- |
| base model | {config.model} (sha256 of its weights {record.provenance.model_sha256[:16]}) |
| task | {record.task["name"]}, version {record.task["version"]} |
| trainable parameters | {record.trainable_parameters:,} |
| steps | {record.steps} of {config.batch_size} items |

```python
{needs if needs_flylora(config.method) else ""}from flylora.models import load_model
from peft import PeftModel

model = PeftModel.from_pretrained(load_model({config.model!r}).model, "path/of/this/folder")
```

Settings, versions and hashes are in train_record.json, the course of training in metrics.jsonl.
"""
