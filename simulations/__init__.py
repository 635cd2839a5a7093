"""How does a config become a run?

Part of the application, not of the library: settings, composition, engines, the round loop, the command line and what a
person sees of a run. Hydra, OmegaConf and Ray are met here and nowhere else.

To add one more experiment: an overlay in `conf/experiment/`. To add an engine: a builder in `engines/` and a YAML in
`conf/engine/`.
"""

import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Nothing calls out by itself. Read by Flower, Ray and others when they are imported: so set before, here, whether a
run is started by a command or from Python."""

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
