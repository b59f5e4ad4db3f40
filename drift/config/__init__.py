"""The typed settings of a run; `load` reads them from YAML."""

from drift.config.load import Setting, dump, explain, load, parse
from drift.config.online import OnlineConfig
from drift.config.schema import (
    Config,
    ConfigError,
    EngineConfig,
    EvalConfig,
    LoRAConfig,
    ModelConfig,
    RolloutConfig,
    TaskConfig,
    TrackConfig,
    TrainConfig,
    WarmStartConfig,
    WeightsConfig,
)
from drift.config.source import EvalSet, SourceConfig

__all__ = [
    "Config",
    "ConfigError",
    "EngineConfig",
    "EvalConfig",
    "EvalSet",
    "LoRAConfig",
    "ModelConfig",
    "OnlineConfig",
    "RolloutConfig",
    "Setting",
    "SourceConfig",
    "TaskConfig",
    "TrackConfig",
    "TrainConfig",
    "WarmStartConfig",
    "WeightsConfig",
    "dump",
    "explain",
    "load",
    "parse",
]
