"""Answers in a given shape: refused before when the shape is none, enforced while decoding, validated after."""
