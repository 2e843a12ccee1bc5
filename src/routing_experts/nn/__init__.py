"""The method in torch alone: adapter, router, gates, losses."""
