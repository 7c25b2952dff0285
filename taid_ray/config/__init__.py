"""Configuration of runs and searches: the schema of every key, search spaces, YAML and overrides. Loads no torch.

Others use `schema` (DistillConfig, build_config, load_config), the sections in `models`, `data`, `objective` and `training`,
`fields` (what a field says of its key), `space` (Space, load_space), `paths` and `text`. What can be known to be wrong without
opening a model or a cluster is refused here, naming the dotted key, the value found and the remedy. The text below a field is
its help, and its entry in the key reference.
"""
