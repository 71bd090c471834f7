"""Immutable, versioned, verified folders: how stages exchange what they make."""
