"""Trainer: datasets to adapters with their evidence."""
