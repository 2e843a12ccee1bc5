"""Judging a model: questions, scores, controls at equal skip rate, and measured seconds."""
