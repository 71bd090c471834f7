"""Inference: models and adapters in; proven, streamed, structured answers out."""
