"""The command `loraline`."""
