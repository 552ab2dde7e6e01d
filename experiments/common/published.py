"""Whether a configuration is the published set-up: only then do its numbers stand beside published ones.

It is where all images are there, and every field that an experiment's ``size`` names is as in its preset ``paper``.
"""

from collections.abc import Mapping
from typing import Any

from experiments.common.experiment import Experiment, identity

# Papers often state no epochs. Fewer than these are a race of speed, whose end says nothing of where learning ends.
ENOUGH = 50
_IMAGES = ("images", "test_images", "split")


def as_published(experiment: Experiment, config: Mapping[str, Any]) -> bool:
    """Whether a configuration is the published set-up.

    Args:
      experiment: whose.
      config: its fields as JSON values, as a run's folder and a file of results hold them.

    Returns:
      False, too, where there is no published number.
    """
    return experiment.size is not None and not _differences(experiment, config)


def smaller(experiment: Experiment, config: Mapping[str, Any]) -> str:
    """A sentence on what is not the published set-up's; empty if all is, or if no number is published."""
    found = _differences(experiment, config) if experiment.size is not None else []
    if not found:
        return ""
    return f"Not the published set-up, so that numbers do not compare: {'; '.join(found)}."


def changed(experiment: Experiment, name: str, config: Mapping[str, Any]) -> str:
    """A sentence on what a preset has of other values today than a run of its name had; empty if nothing."""
    today = identity(experiment.name, experiment.presets[name]) if name in experiment.presets else {}
    found = [
        f"{field.replace('_', ' ')} {_said(value)}, not {_said(config[field])}"
        for field, value in today.items()
        if field in config and config[field] != value
    ]
    return f"The preset has changed since: {'; '.join(found)}." if found else ""


def _differences(experiment: Experiment, config: Mapping[str, Any]) -> list[str]:
    full = identity(experiment.name, experiment.presets["paper"])
    fields = (*_IMAGES, *(experiment.size or ()))
    found = [
        f"{field.replace('_', ' ')} {_said(config.get(field, 'unknown'))}, not {_said(full[field])}"
        for field in fields
        if config.get(field, "unknown") != full[field]
    ]
    least = min(ENOUGH, full["epochs"])
    return found + ([f"epochs {config['epochs']}, not {least} or more"] if config["epochs"] < least else [])


def _said(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(str, value))
    return "all" if value is None else str(value)
