"""Evidence that travels with an adapter: the token receipt and the probes, as plain data that every stage can check."""
