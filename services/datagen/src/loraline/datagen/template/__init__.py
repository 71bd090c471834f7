"""Rows from pools and templates: seeded, reproducible, without a model."""
