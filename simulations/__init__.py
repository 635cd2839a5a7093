"""How does a config become a run?

Part of the application, not of the library: settings, composition, engines, the round loop, the command line and what a
person sees of a run. Hydra, OmegaConf and Ray are met here and nowhere else.

To add one more experiment: an overlay in `conf/experiment/`. To add an engine: a builder in `engines/` and a YAML in
`conf/engine/`.
"""
