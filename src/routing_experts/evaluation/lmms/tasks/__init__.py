"""lmms-eval tasks that ship with the package: found by folder, not imported."""
