"""KV hand-off between workers: publish, pull, release, and the transports that carry the bytes."""
