"""Measured seconds: dense, routed, and the static twin, in interleaved runs of the same work."""
