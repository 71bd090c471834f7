"""The merger: a base and an adapter in; one model folder, measured against both, out."""
