"""What the stages share: artifacts, jobs, serving, evidence, diagnostics. Never torch."""
