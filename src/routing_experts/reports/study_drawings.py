"""Which figures a study's page has, with their captions and what they say to those who do not see them."""

from functools import partial
from pathlib import Path
from statistics import mean

from routing_experts.records import StudyRecord, StudyRun, from_bits
from routing_experts.reports.figures import draw_heat_map
from routing_experts.reports.gallery import layers_in_words
from routing_experts.reports.many import draw_arms
from routing_experts.reports.page import Drawing, drawing_of
from routing_experts.reports.routes import draw_routes
from routing_experts.reports.study_data import authors_routes, depths, fronts_of, reference_run
from routing_experts.reports.study_figures import draw_depths, draw_difficulty, draw_front, draw_layer_rates
from routing_experts.reports.summary import percent

MISSING = "Not drawn: the record holds no routes."


def front_drawing(study: StudyRecord, figures: Path) -> Drawing:
    """Accuracy against work left out, of all arms."""
    fronts = fronts_of(study)
    return drawing_of(
        figures,
        "Accuracy against work left out",
        partial(draw_front, study, fronts) if fronts else None,
        "A line an arm at the mean of its seeds, a band from the worst to the best. Up and to the right is better. "
        "What falls far below the base runs off the figure; the tables have it.",
        "Not drawn: nothing that saves work has run.",
        "; ".join(
            f"{arm}: " + ", ".join(f"{percent(mean(p.accuracies))} at {percent(p.skip_rate)}" for p in front)
            for arm, front in fronts.items()
        ),
    )


def route_drawings(study: StudyRecord, figures: Path) -> list[Drawing]:
    """What the reference's routes are like, and every arm's accuracies."""
    run = reference_run(study)
    arms = drawing_of(
        figures,
        "Accuracy by arm",
        partial(draw_arms, study) if study.runs else None,
        "A mark a seed, a bar at the mean, the stronger the more is skipped; dashed: the base model, untuned.",
        "Not drawn: nothing has run.",
        "; ".join(f"{one.arm} seed {one.seed}: {percent(one.accuracy)}" for one in study.runs),
    )
    if run is None:
        return [drawing_of(figures, "Which layers each task skips", None, "", MISSING, ""), arms]
    of = f"{run.arm} at {percent(run.wanted)}, seed {run.seed}"
    return [*_by_layer(run, of, figures), *_by_question(study, run, of, figures), arms]


def _by_layer(run: StudyRun, of: str, figures: Path) -> list[Drawing]:
    rows = [("all questions", list(run.layer_skip_rates), run.skip_rate)]
    rows += [(task, rates, run.task_skip_rate[task]) for task, rates in run.task_layer_skip_rates.items()]
    return [
        drawing_of(
            figures,
            "Which layers each task skips",
            partial(draw_heat_map, rows),
            f"Of {of}: how often each decoder layer is skipped, in per cent of the questions. Layers count from 0.",
            MISSING,
            "; ".join(f"{task} {percent(rate)}" for task, rate in run.task_skip_rate.items()),
        ),
        drawing_of(
            figures,
            "How often each layer is skipped",
            partial(draw_layer_rates, run.layer_skip_rates, authors_routes().layer_skip_rates),
            f"Of {of}, and of the 12,584 examples that the authors of the method logged of their 32 layers.",
            MISSING,
            "Skip rate by depth, here and in the authors' log.",
        ),
    ]


def _by_question(study: StudyRecord, run: StudyRun, of: str, figures: Path) -> list[Drawing]:
    num_layers = len(run.layer_skip_rates)
    return [
        drawing_of(
            figures,
            "How many layers questions skip",
            partial(draw_depths, run, num_layers, authors_routes().skipped),
            f"Of {of}, bars; the authors' log, line: as a share of each model's own layers.",
            MISSING,
            "; ".join(f"{count} skipped: {percent(share)}" for count, share in depths(run, num_layers).items()),
        ),
        drawing_of(
            figures,
            "Commonest routes",
            partial(draw_routes, run.routes, len(run.right)),
            f"Of {of}: filled cells ran; the bar is the share of questions, beside it how many were answered right.",
            MISSING,
            "; ".join(f"{layers_in_words(from_bits(r.keeps))} {r.questions}" for r in run.routes[:5]),
        ),
        drawing_of(
            figures,
            "Difficulty and depth",
            partial(draw_difficulty, study, run, num_layers) if study.base else None,
            f"Of {of}. Difficulty: the loss that the base model, not trained further, has on the right answer.",
            MISSING,
            "Layers run and answers right, by tenths of difficulty.",
        ),
    ]
