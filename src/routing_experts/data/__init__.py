"""Dialogues about pictures: records, prompts, token ids with turn spans, and the digits task."""
