"""Pipelines: one YAML file from raw text to a served, proven adapter, which can be run again and again."""
