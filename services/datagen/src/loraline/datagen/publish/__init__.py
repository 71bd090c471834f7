"""Rows to a dataset's folder: duplicates, split, files, data card."""
