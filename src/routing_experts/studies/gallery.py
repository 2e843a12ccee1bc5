"""Questions that the reference wins and loses against dense, with pictures and what both said: for the report."""

from pathlib import Path

from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.gallery import save_gallery
from routing_experts.models.load import from_pretrained, load_base
from routing_experts.records import StudyRun
from routing_experts.studies.contest import Contest
from routing_experts.studies.jobs import Job
from routing_experts.training.folder import RunFolder

EACH = 6


def write_wins_and_losses(contest: Contest, routed: StudyRun) -> None:
    """Asks both models the questions on which one of them alone is right, and writes them into the study's folder.

    Nothing is written where the run's model is not at hand. Dense is the arm that was tuned as long, where the study
    has one with the same seed; else the base.

    Args:
        contest: the study's.
        routed: the run that is shown.
    """
    own = RunFolder(Job(routed.arm, routed.wanted, routed.seed).folder(contest.output)).model
    if not own.is_dir():
        return
    dense_job = _dense_job(contest, routed.seed)
    dense_folder = RunFolder(dense_job.folder(contest.output)).model if dense_job else None
    found = contest.found(dense_job) if dense_job else None
    if dense_folder is None or found is None or not dense_folder.is_dir():
        model, right = contest.base, contest.answers_of_base.right
    else:
        model, right = load_base(dense_folder), found.right
    pairs = list(zip(routed.right, right, strict=True))
    wins = [i for i, pair in enumerate(pairs) if pair == ("1", "0")][:EACH]
    losses = [i for i, pair in enumerate(pairs) if pair == ("0", "1")][:EACH]
    questions = [contest.questions[index] for index in wins + losses]
    if questions:
        said = [ask(one, contest.processor, questions) for one in (model, from_pretrained(own))]
        save_gallery(Path(contest.output), questions, *said)


def _dense_job(contest: Contest, seed: int) -> Job | None:
    name = next((name for name, arm in contest.study.arms.items() if arm.control == "dense"), None)
    return Job(name, 0.0, seed) if name else None
