"""The port to the engines that generate, and its two implementations."""
