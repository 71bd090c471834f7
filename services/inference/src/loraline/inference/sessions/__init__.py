"""Conversations that are kept on the server: one key's own, with an end, one turn at a time."""
