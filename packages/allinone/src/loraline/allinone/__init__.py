"""All four stages in one process: the same components that run apart in a cluster."""
