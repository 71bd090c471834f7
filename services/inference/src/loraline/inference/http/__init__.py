"""The OpenAI-compatible HTTP side: three routes and nothing else."""
