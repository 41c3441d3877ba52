"""Describe a run, so that only the same run resumes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from structattn.layers import MLRConfig, as_config
from structattn.training.config import TrainConfig

if TYPE_CHECKING:
    from structattn.models import BackboneConfig, StructuredModel


def describe_run(config: TrainConfig, model: StructuredModel, processes: int) -> dict[str, str]:
    """Return training settings, model settings and process count, each as text."""
    described = {name: repr(value) for name, value in asdict(config).items()}
    settings = model.config.to_diff_dict()
    if "attention" in settings:
        settings["attention"] = _attention_text(model.config)
    described |= {f"model.{name}": repr(settings[name]) for name in settings if name != "transformers_version"}
    return described | {"processes": repr(processes)}


def _attention_text(config: BackboneConfig) -> str | list[str]:
    """Return the attention as text, as checkpoints hold it.

    It is the spelling, or for MLR attention the fields that are set: what a spelling of MLR attention means depends on
    its defaults, and those of version 0.1.0 were the paper's.
    """
    texts = []
    for each in map(as_config, config.structures):
        given = {name: value for name, value in each.to_dict().items() if value not in (None, False)}
        texts.append(str(given) if isinstance(each, MLRConfig) else str(each))
    return texts if isinstance(config.attention, list) else texts[0]


def check_same_run(saved: Mapping[str, str], current: Mapping[str, str], folder: Path) -> None:
    """Check that two descriptions are equal.

    A training setting that an earlier version did not save had its default, and a setting of the model was None.

    Raises:
        ValueError: they differ; names the first setting that does, and its two values.
    """
    defaults = {field.name: repr(field.default) for field in fields(TrainConfig)}
    for name in sorted(saved.keys() | current.keys()):
        default = repr(None) if name.startswith("model.") else defaults.get(name)
        before, now = (described.get(name, default) for described in (saved, current))
        if before != now:
            raise ValueError(
                f"{folder} holds a run with {name} = {before}, which cannot go on with {name} = {now}; choose "
                "another folder"
            )
