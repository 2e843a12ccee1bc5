"""Questions that the reference wins and loses against dense, with pictures and what both said: for the report."""

from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.gallery import save_gallery
from routing_experts.models.load import from_pretrained, load_base
from routing_experts.records import GALLERY_NAME, StudyRun
from routing_experts.studies.contest import Contest
from routing_experts.studies.jobs import Job
from routing_experts.training.folder import RunFolder

EACH = 6


def write_wins_and_losses(contest: Contest, routed: StudyRun | None) -> None:
    """Asks both models the questions on which one of them alone is right, and writes them into the study's folder.

    Dense is the arm that was tuned as long, where its model of the same seed is at hand; else the base, and then the
    base is named. Where the run's own model is not at hand nothing is written, and nothing of another run left.

    Args:
        contest: the study's.
        routed: the run that is shown, if there is one.
    """
    (contest.output / GALLERY_NAME).unlink(missing_ok=True)
    if routed is None:
        return
    own = RunFolder(Job(routed.arm, routed.wanted, routed.seed).folder(contest.output)).model
    if not own.is_dir():
        return
    dense_job = _dense_job(contest, routed.seed)
    dense_folder = RunFolder(dense_job.folder(contest.output)).model if dense_job else None
    found = contest.found(dense_job) if dense_job else None
    if dense_job is None or dense_folder is None or found is None or not dense_folder.is_dir():
        name, model, right = "the base model", contest.base, contest.answers_of_base.right
    else:
        name, model, right = dense_job.arm, load_base(dense_folder), found.right
    pairs = list(zip(routed.right, right, strict=True))
    wins = [i for i, pair in enumerate(pairs) if pair == ("1", "0")][:EACH]
    losses = [i for i, pair in enumerate(pairs) if pair == ("0", "1")][:EACH]
    questions = [contest.questions[index] for index in wins + losses]
    if questions:
        asked_as = contest.plan.data.prompt_format
        asked_as = contest.plan.data.prompt_format
        dense, own_said = (
            ask(one, contest.processor, questions, prompt_format=asked_as) for one in (model, from_pretrained(own))
        )
        names = (name, f"{routed.arm} at {routed.wanted:.0%}")
        save_gallery(contest.output, questions, dense, own_said, names=names)


def _dense_job(contest: Contest, seed: int) -> Job | None:
    name = next((name for name, arm in contest.study.arms.items() if arm.control == "dense"), None)
    return Job(name, 0.0, seed) if name else None
