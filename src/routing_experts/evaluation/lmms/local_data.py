"""Data in local folders: datasets knows what it has prepared by name alone, and would serve what lay there before."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CACHE = "HF_DATASETS_CACHE"


@contextmanager
def prepared_anew(folders: Sequence[Path]) -> Iterator[None]:
    """Within, what datasets prepares of these folders is kept apart by their places and contents; others as ever."""
    if not folders:
        yield
        return
    import datasets
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    told, before = os.environ.get(CACHE), datasets.config.HF_DATASETS_CACHE
    apart = Path(_resolve_hf_datasets_cache_dir()) / f"local-{contents_of(folders)}"
    os.environ[CACHE], datasets.config.HF_DATASETS_CACHE = str(apart), apart
    _resolve_hf_datasets_cache_dir.cache_clear()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
        os.environ.pop(CACHE)
        if told is not None:
            os.environ[CACHE] = told
        _resolve_hf_datasets_cache_dir.cache_clear()


def contents_of(folders: Sequence[Path]) -> str:
    """A hash of where the folders are, and of their files' names, sizes and times."""
    digest = hashlib.sha256()
    for folder in sorted(folder.resolve() for folder in folders):
        digest.update(f"{folder}\n".encode())
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            state = path.stat()
            digest.update(f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
