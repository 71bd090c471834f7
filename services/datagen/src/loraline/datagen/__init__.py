"""Datagen: raw files, templates and language models to datasets."""
