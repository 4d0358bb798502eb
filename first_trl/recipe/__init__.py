"""From a YAML file to a checked recipe: start at `loading`; the settings themselves are `first_trl.config`."""
