"""All settings of a run: frozen dataclasses < YAML file < ``key=value`` on the command line.

The sections ``model``, ``weighting`` and ``strategy`` name a plugin and hold its options beside the name. The options
are checked against the plugin's own parameters, and missing options get their defaults. If an override names another
plugin than the file, the file's options of that section are dropped.

If a key holds text, its value is exactly the text in the file or after the ``=``; only a leading ``~/`` becomes the
home folder. All other values are YAML. In a file, ``${...}`` refers to another key, and ``\\${`` is a literal ``${``.
"""

from mtunet_dist.config.loading import (
    PLUGIN_SECTIONS,
    config_from_text,
    flat,
    load_config,
    plugin_options,
    save_config,
)
from mtunet_dist.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DaliConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
)

__all__ = [
    "PLUGIN_SECTIONS",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DaliConfig",
    "DataConfig",
    "LogConfig",
    "OptimConfig",
    "config_from_text",
    "flat",
    "load_config",
    "plugin_options",
    "save_config",
]
