"""From YAML to settings: files, presets, registries. No torch at import."""
