"""Configuration of a run: YAML in, validated and immutable data out."""

from fpsim.config.load import (
    config_hash,
    config_to_yaml,
    json_schema,
    load_config,
    load_format,
    load_section,
    parse_config,
    parse_emulation,
)
from fpsim.config.presets import Preset, preset_folder, presets
from fpsim.config.schema import (
    BlockFormatSpec,
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
    number_format,
)

__all__ = [
    "BlockFormatSpec",
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
    "load_format",
    "load_section",
    "number_format",
    "parse_config",
    "parse_emulation",
    "preset_folder",
    "presets",
]
