"""Several processes: collectives, shards, and which rows each of them holds."""
