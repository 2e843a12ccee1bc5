"""Models that several files ask."""

from typing import Any

import pytest

from routing_experts import convert, load_pocket


@pytest.fixture(scope="session")
def pocket() -> tuple[Any, Any]:
    """The pocket model, converted, and its processor."""
    model, processor = load_pocket()
    return convert(model, processor=processor), processor
