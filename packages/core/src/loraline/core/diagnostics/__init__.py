"""The field's known failures, and our own reasons, as data: what happened and what to do, in three languages."""

from loraline.core.diagnostics.catalog import Entry, Language, entries, explain, find, match

__all__ = ["Entry", "Language", "entries", "explain", "find", "match"]
