"""`mode="shard_map"`: loss and gradients with explicit collectives."""
