"""Adapters: named by digest, checked before the engine sees them, proven once it has them."""
