"""Judging a run from its loss curve: pure Python, no torch. `judging.judge` is the entrance."""
