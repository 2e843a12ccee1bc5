"""What lmms-eval changes for its whole process, changed back once it has run: others live there too."""

import contextlib
from collections.abc import Iterator

from routing_experts.data.images import whole_pictures


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """lmms-eval inside; silent, for what fails is raised.

    Its import tells Pillow to fill pictures that are cut short with grey; a run of it makes every file lock of the
    process re-entrant by path, so that one that is held here is got once more.
    """
    from filelock._api import FileLockMeta
    from loguru import logger

    with whole_pictures():
        from lmms_eval import evaluator

    call = FileLockMeta.__call__
    logger.disable("lmms_eval")
    try:
        with whole_pictures():
            yield
    finally:
        logger.enable("lmms_eval")
        FileLockMeta.__call__ = call  # type: ignore[method-assign]
        evaluator._enable_reentrant_filelocks._patched = False
