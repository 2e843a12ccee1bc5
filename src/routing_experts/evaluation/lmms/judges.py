"""Benchmarks whose scorers ask a judge over the network: without it, lmms-eval scores their answers 0."""

import functools
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from routing_experts.errors import EvaluationError

INSTEAD = {"mmvet": "roe_mmvet", "mmbench_en_dev": "mmbench_en_dev_static"}  # what needs none
KNOWN = {*INSTEAD, "mmvetv2", "mmbench_cn_dev", "llava_in_the_wild", "hallusion_bench_image"}
KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
_SIGNS = re.compile(r"api_key|openai|judge|get_server|get_chat_response", re.IGNORECASE)
_TASKS = Path("lmms_eval") / "tasks"


def refuse_unjudged(name: str, scorers: Iterable[Any]) -> None:
    """Refuses a task that a judge scores, where no key for one is set.

    Args:
        name: the task's.
        scorers: the functions that score its answers.

    Raises:
        EvaluationError: naming a way without, if we know one.
    """
    if any(os.environ.get(key) for key in KEYS) or name in INSTEAD.values():
        return
    if name not in KNOWN and not asks_a_judge(scorers):
        return
    instead = f"take {INSTEAD[name]}, which needs no judge" if name in INSTEAD else "leave it out"
    raise EvaluationError(
        f"task {name!r} is graded by a judge over the network, and OPENAI_API_KEY is not set: its answers would be "
        f"scored 0. Set the key, or {instead}. If it needs none after all, run lmms-eval itself (--model roe)."
    )


def asks_a_judge(scorers: Iterable[Any]) -> bool:
    """Whether code of a task that its scorers reach names a judge or a key for one."""
    waiting, seen = list(scorers), set()
    while waiting:
        function = _bare(waiting.pop())
        if function is None or function in seen:
            continue
        seen.add(function)
        names = set(_names(function.__code__))
        if any(_SIGNS.search(name) for name in names):
            return True
        for name in names & function.__globals__.keys():
            waiting += _functions_of(function.__globals__[name], Path(function.__code__.co_filename).parent)
    return False


def _bare(scorer: Any) -> FunctionType | None:
    while isinstance(scorer, functools.partial):
        scorer = scorer.func
    scorer = getattr(scorer, "__func__", scorer)
    return scorer if isinstance(scorer, FunctionType) else None


def _names(code: CodeType) -> Iterator[str]:
    """All that a function's code refers to, that of the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _functions_of(value: Any, folder: Path) -> list[FunctionType]:
    """A function, or those of a class or of an instance's, as far as tasks' own code has it."""
    if not isinstance(value, FunctionType) and not inspect.isclass(value):
        value = type(value)
    found = list(vars(value).values()) if inspect.isclass(value) else [value]
    bare = [function for function in map(_bare, found) if function is not None]
    return [function for function in bare if _is_a_task_s(Path(function.__code__.co_filename), folder)]


def _is_a_task_s(path: Path, folder: Path) -> bool:
    return path.parent == folder or str(_TASKS) in str(path)
