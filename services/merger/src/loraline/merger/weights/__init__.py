"""Reading safetensors folders from their headers, and copying them shard by shard. No torch here."""
