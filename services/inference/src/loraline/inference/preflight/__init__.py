"""Looks at what the engine will need, before it is built, and says what it died of."""
