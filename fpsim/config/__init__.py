"""Configuration of a run: YAML in, validated and immutable data out."""

from fpsim.config.load import config_hash, config_to_yaml, json_schema, load_config, parse_config, parse_emulation
from fpsim.config.presets import Preset, preset_folder, presets
from fpsim.config.schema import (
    Config,
    Data,
    Emulation,
    FormatSpec,
    GradientSpec,
    Model,
    Override,
    Pruning,
    TensorSpec,
    Training,
)

__all__ = [
    "Config",
    "Data",
    "Emulation",
    "FormatSpec",
    "GradientSpec",
    "Model",
    "Override",
    "Preset",
    "Pruning",
    "TensorSpec",
    "Training",
    "config_hash",
    "config_to_yaml",
    "json_schema",
    "load_config",
    "parse_config",
    "parse_emulation",
    "preset_folder",
    "presets",
]
