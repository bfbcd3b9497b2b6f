"""Settings from YAML: files, presets, registries. No torch at import."""
