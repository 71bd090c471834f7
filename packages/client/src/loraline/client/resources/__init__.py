"""One module per service: what a client can ask of it."""
