"""The trained parameters: built, as roles, as files."""
