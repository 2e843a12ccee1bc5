"""Answering: prompts to routed generations, with the route that each row took."""
