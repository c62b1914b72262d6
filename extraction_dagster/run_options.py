"""What one run may do differently from the settings, and what of it is refused before any work.

A run's options never change what other runs do: what they make is kept under fingerprints of its own, and the next
ordinary run of the range brings it back to the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from extraction_dagster.errors.runs import RunOptionError
from extraction_dagster.settings import PREFIX, Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

# Every setting that a run may override; their descriptions are those of the settings.
OVERRIDABLE = (
    "decoder",
    "sampling",
    "fps",
    "num_frames",
    "max_frames",
    "min_frames",
    "scene_distance",
    "reject_solid",
    "crop_bars",
    "drop_duplicates",
    "model",
    "embedding_dim",
    "device",
    "embed_batch_size",
    "decode_workers",
    "decode_timeout_seconds",
)
# Those that decide which vectors come out, hence which collection they go into.
_OF_THE_MODEL = ("model", "embedding_dim")
# Options that only one way of sampling looks at.
_SAMPLING_OF = {"fps": "fps", "num_frames": "uniform", "scene_distance": "scene"}


def settings_with(options: Mapping[str, object]) -> Settings:
    """The settings of a run: those of the environment, with the run's options in their place.

    Args:
        options: Values by the name of their setting.

    Raises:
        SettingsError: The environment's own settings are wrong.
        RunOptionError: An option's value is not possible, or would change nothing.
    """
    settings = load_settings()
    if not options:
        return settings
    try:
        changed = Settings(**options)  # type: ignore[arg-type]  # checked by the model itself
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ", ".join(sorted(options))
        raise RunOptionError(name, _shown(options, name), first["msg"].removeprefix("Value error, ")) from None
    _refuse_options_without_effect(options, changed)
    return changed


def _refuse_options_without_effect(options: Mapping[str, object], settings: Settings) -> None:
    """Refuse an option that changes nothing: it was meant otherwise."""
    for name, sampling in _SAMPLING_OF.items():
        if name in options and settings.sampling != sampling:
            expected = f"it left out, or sampling={sampling}: with sampling={settings.sampling} it changes nothing"
            raise RunOptionError(name, _shown(options, name), expected)
    if "max_frames" in options and settings.sampling == "uniform":
        expected = "num_frames in its place: with sampling=uniform it changes nothing"
        raise RunOptionError("max_frames", _shown(options, "max_frames"), expected)


def _shown(options: Mapping[str, object], name: str) -> str:
    return repr(options[name]) if name in options else ", ".join(f"{key}={options[key]}" for key in sorted(options))


def describe_options(options: Mapping[str, object]) -> str:
    """Options as one short text: `fps=2.0, sampling=fps`."""
    return ", ".join(f"{name}={options[name]}" for name in sorted(options))


def model_as_environment(settings: Settings) -> str:
    """The variables that give every command the vectors of these settings: `EXTRACTION_MODEL=./clip`."""
    values = {name: getattr(settings, name) for name in _OF_THE_MODEL}
    return " ".join(f"{PREFIX}{name.upper()}={value}" for name, value in values.items() if value is not None)


def describe_option(name: str) -> str:
    """What an option means, as the launchpad shows it."""
    return f"{Settings.model_fields[name].description} Left out: as {PREFIX}{name.upper()} says."
