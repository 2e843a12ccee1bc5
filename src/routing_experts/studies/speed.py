"""How long contenders take, measured: each beside the base model, in turn, on the same held-out questions.

Of every arm at every rate one model is timed: of the first seed whose model is still in the study's folder. Controls
that drop whole layers are timed without them, as somebody would run them: no routing in their way. To be measured while
nothing else runs.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from routing_experts.evaluation.bench.models import twin_of
from routing_experts.evaluation.bench.work import generate_seconds, interleave, prefill_seconds
from routing_experts.evaluation.pruning import TokenPruner, share_for
from routing_experts.evaluation.questions import records_of
from routing_experts.inference.generate import prompt_batches, to_model
from routing_experts.models.load import from_pretrained, is_routed_folder, load_base
from routing_experts.records import ArmSpeed, origin
from routing_experts.studies.contest import Contest
from routing_experts.studies.jobs import Job, jobs_of
from routing_experts.studies.plan import STATIC_CONTROLS
from routing_experts.training.folder import RunFolder

BATCHES = (1, 16)
SINGLES = 8  # questions that are timed one by one: routes differ from question to question
GENERATED = 8  # tokens
REPEATS = 7
Phase = Literal["prefill", "generate"]


def timed(contest: Contest) -> list[ArmSpeed]:
    """Seconds of every contender whose model is at hand."""
    jobs = timed_jobs(contest)
    with contest.bar("timing", len(jobs)) as advance:
        return arm_speeds(contest, jobs, advance)


def timed_jobs(contest: Contest) -> list[Job]:
    """The first run of each arm at each rate whose model is at hand; routes drawn by chance are not timed."""
    found: dict[tuple[str, float], Job] = {}
    for job in jobs_of(contest.study):
        at_hand = contest.found(job) is not None and _folder(contest, job).is_dir()
        if at_hand and contest.study.arms[job.arm].control != "random":
            found.setdefault((job.arm, job.rate), job)
    return list(found.values())


def _folder(contest: Contest, job: Job) -> Path:
    """Where the model lies that a job asks."""
    return RunFolder(contest.model_job(job).folder(contest.output)).model


def arm_speeds(contest: Contest, jobs: Sequence[Job], advance: Callable[[int], None]) -> list[ArmSpeed]:
    """Each job's prefill and whole answers, alone and in a batch of mixed questions."""
    batches = {size: _prompts(contest, size) for size in BATCHES}
    found, made = [], origin()
    for job in jobs:
        model, context = _model_of(contest, job)
        for size, prompts in batches.items():
            for phase in ("prefill", "generate"):
                base = partial(_seconds, contest.base, prompts, phase)
                arm = partial(_within, context, model, prompts, phase)
                base_seconds, arm_seconds = interleave((base, arm), REPEATS)
                found.append(
                    ArmSpeed(
                        arm=job.arm,
                        wanted=job.rate,
                        seed=job.seed,
                        phase=phase,
                        batch=size,
                        base_seconds=base_seconds,
                        arm_seconds=arm_seconds,
                        made=made,
                    )
                )
        advance(1)
    return found


def _prompts(contest: Contest, size: int) -> list[dict[str, Tensor]]:
    """Batches of that many questions: one of many, or several of one."""
    records = records_of(contest.questions[: SINGLES if size == 1 else size])
    base = contest.base
    asked_as = contest.plan.data.prompt_format
    return [to_model(batch, base) for batch in prompt_batches(base, contest.processor, records, size, asked_as)]


def _model_of(contest: Contest, job: Job) -> tuple[Any, Callable[[], Any]]:
    """A run's model, and the context that it is called in."""
    folder, control = _folder(contest, job), contest.study.arms[job.arm].control
    model = from_pretrained(folder) if is_routed_folder(folder) else load_base(folder)
    if control in STATIC_CONTROLS:
        route = torch.ones(contest.num_layers, dtype=torch.bool)
        route[list(model.roe_config.layers_to_route(contest.num_layers))] = False
        return twin_of(model, route, adapters=control != "early_exit"), nullcontext
    if control != "pruning":
        return model, nullcontext
    return model, TokenPruner(model, share_for(job.rate, contest.image_shares, contest.num_layers)).pruned


def _within(context: Callable[[], Any], model: Any, prompts: Sequence[dict[str, Tensor]], phase: Phase) -> float:
    with context():
        return _seconds(model, prompts, phase)


def _seconds(model: Any, prompts: Sequence[dict[str, Tensor]], phase: Phase) -> float:
    """Of all prompts, one after the other."""
    if phase == "prefill":
        return sum(prefill_seconds(model, batch) for batch in prompts)
    return sum(generate_seconds(model, batch, GENERATED) for batch in prompts)
