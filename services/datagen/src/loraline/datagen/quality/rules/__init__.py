"""The rules: each sees every row once and tells what it found at the end."""
