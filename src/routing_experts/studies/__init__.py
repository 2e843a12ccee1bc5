"""Studies: contenders trained alike, asked the same questions, and compared."""
