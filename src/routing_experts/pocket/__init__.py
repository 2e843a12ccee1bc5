"""The pocket model: configuration, tokenizer, processor and trained weights, shipped with the package."""
