"""The lmms-eval plug-in: routed models among its models, its tasks behind ``roe evaluate --tasks``."""
