"""What lmms-eval changes for its whole process, changed back once it has run: others live there too."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """lmms-eval inside; silent, for what fails is raised.

    Its import tells Pillow to fill pictures that are cut short with grey; a run of it makes every file lock of the
    process re-entrant by path, so that one that is held here is got once more.
    """
    from filelock._api import FileLockMeta
    from loguru import logger
    from PIL import ImageFile

    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    from lmms_eval import evaluator

    ImageFile.LOAD_TRUNCATED_IMAGES = truncated
    call = FileLockMeta.__call__
    logger.disable("lmms_eval")
    try:
        yield
    finally:
        logger.enable("lmms_eval")
        FileLockMeta.__call__ = call  # type: ignore[method-assign]
        evaluator._enable_reentrant_filelocks._patched = False
