"""Several processes: what they tell one another, networks in shards, and how all of them stop."""
