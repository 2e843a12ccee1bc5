"""What touches transformers: families, spans, the routed layer, routing context, cache, conversion, checkpoints."""
