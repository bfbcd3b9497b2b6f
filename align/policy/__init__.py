"""The trained parameters: construction, roles, files."""
