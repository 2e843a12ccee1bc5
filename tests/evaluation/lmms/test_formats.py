"""Ten benchmarks in their own formats: lmms-eval's own tasks over tiny local sets, each scorer's path to a known score.

The right answers of every second document are what the model says, found in a first run; so the scores are known.
"""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from routing_experts.evaluation.lmms.harness import Plan, run_tasks, sides_of
from routing_experts.evaluation.questions import digits_questions

datasets = pytest.importorskip("datasets")

COUNT = 6
NOT_SAID = "zebra"
OPTIONS = {"A": "1", "B": "2", "C": "4", "D": "7"}


def picture(index: int) -> dict[str, Any]:
    shown = [question for question in digits_questions(40, 77) if question.record.images]
    buffer = io.BytesIO()
    shown[index].record.images[0].save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def question(index: int) -> str:
    shown = [one for one in digits_questions(40, 77) if one.record.images]
    return shown[index].record.turns[0].question.replace("<image>\n", "")


def write(root: Path, name: str, splits: dict[str, tuple[str, list[dict[str, Any]]]], images: str = "image") -> None:
    """A dataset's folder as the hub has it; ``splits``: by configuration, the split's name and its rows."""
    folder = root / "lmms-lab-encoder" / name
    folder.mkdir(parents=True)
    configs = []
    for config, (split, rows) in splits.items():
        table = datasets.Dataset.from_list(rows)
        if images in table.column_names:
            kind = datasets.Image()
            table = table.cast_column(images, [kind] if isinstance(rows[0][images], list) else kind)
        table.to_parquet(str(folder / f"{config}.parquet"))
        configs += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {config}.parquet"]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", ""]))


def gqa(root, said):
    rows = [{"id": str(i), "imageId": f"n{i}", "question": question(i), "answer": said(i)} for i in range(COUNT)]
    pictures = [{"id": f"n{i}", "image": picture(i)} for i in range(COUNT)]
    configs = {"testdev_balanced_instructions": ("testdev", rows), "testdev_balanced_images": ("testdev", pictures)}
    write(root, "GQA", configs)


def pope(root, said):
    rows = [
        {"question_id": str(i), "question": question(i), "answer": said(i), "image": picture(i), "category": "random"}
        for i in range(COUNT)
    ]
    write(root, "POPE", {"default": ("test", rows)})


def vqa(name, split, **more):
    def make(root, said):
        answers = [[said(i)] * 10 for i in range(COUNT)]
        if name == "VQAv2":
            answers = [[{"answer": text, "answer_id": n} for n, text in enumerate(row)] for row in answers]
        rows = [
            {"question_id": str(i), "question": question(i), "answers": answers[i], "image": picture(i), **more}
            for i in range(COUNT)
        ]
        write(root, name, {"default": (split, rows)})

    return make


def mme(root, said):
    """Two questions a picture; half of the score is for both being right."""
    rows = [
        {"question_id": str(i // 2), "question": question(i // 2 * 2), "answer": said(i), "image": picture(i // 2 * 2)}
        | {"category": "existence" if i < 4 else "code_reasoning"}
        for i in range(COUNT)
    ]
    write(root, "MME", {"default": ("test", rows)})


def mmbench(root, said):
    rows = [
        {"index": i, "question": question(i), "hint": "nan", "answer": said(i), **OPTIONS}
        | {"category": "one", "L2-category": "two", "source": "here", "split": "dev", "image": picture(i)}
        for i in range(COUNT)
    ]
    write(root, "MMBench", {"en": ("dev", rows)})


def scienceqa(root, said):
    rows = [
        {"question": question(i), "hint": "", "choices": ["some", "other"], "answer": 0 if said(i) == "A" else 1}
        | {"image": picture(i)}
        for i in range(COUNT)
    ]
    write(root, "ScienceQA", {"ScienceQA-IMG": ("test", rows)})


def seedbench(root, said):
    rows = [
        {"question_id": str(i), "question": question(i), "answer": said(i)[:1], "data_type": "image"}
        | {f"choice_{letter}": f"{letter} thing" for letter in "abcd"}
        | {"image": [picture(i)]}
        for i in range(COUNT)
    ]
    write(root, "SEED-Bench", {"default": ("test", rows)})


def mmvet(root, said):
    rows = [
        {"question_id": str(i), "question": question(i), "answer": f"{said(i)}<AND>{said(i)}", "capability": "rec"}
        | {"image": picture(i)}
        for i in range(COUNT)
    ]
    write(root, "MMVet", {"default": ("test", rows)})


SETS = {
    "gqa": (gqa, "exact_match", 0.5),
    "textvqa_val": (vqa("textvqa", "validation", ocr_tokens=["3"]), "exact_match", 0.5),
    "vqav2_val": (vqa("VQAv2", "validation"), "exact_match", 0.5),
    "vizwiz_vqa_val": (vqa("VizWiz-VQA", "val"), "exact_match", 0.5),
    "seedbench": (seedbench, "seed_all", 0.5),
    "roe_mmvet": (mmvet, "elements_found", 0.5),
}


@pytest.fixture
def say(monkeypatch):
    """Has the model say given words in turn: the digits' own answers are no letters, and seldom yes or no."""
    from routing_experts.evaluation.lmms import model as model_module

    answer = model_module.answer

    def call(*words: str) -> None:
        def scripted(model, processor, records, *args, **settings):
            given = answer(model, processor, records, *args, **settings)
            for record, one in zip(records, given, strict=True):
                yield replace(one, text=words[int(record.id.split("/")[2]) % len(words)])

        monkeypatch.setattr(model_module, "answer", scripted)

    return call


@pytest.fixture
def enter(tmp_path, monkeypatch, cache_in):
    """Enters a new place, where datasets are looked for, with a cache of its own."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def call(name: str) -> Path:
        root = tmp_path / name
        root.mkdir()
        monkeypatch.chdir(root)
        cache_in(root / "cache")
        return root

    return call


def scores_of(folder, name, root, limit=None, **settings):
    plan = Plan((name,), limit=limit, batch_size=4, log=root / "log", output=root, settings={"device": "cpu"})
    return run_tasks(str(folder), plan, sides_of(True, ()))


def answers_of(root: Path) -> list[str]:
    lines = map(json.loads, (root / "log" / "routed" / "samples-0.jsonl").read_text().splitlines())
    return [line["text"] for line in sorted(lines, key=lambda line: int(line["id"].split("/")[2]))]


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_benchmark_s_own_scorer_finds_the_known_score(name, routed_folder, enter):
    make, metric, known = SETS[name]
    root = enter("first")
    make(root, lambda i, *_: NOT_SAID)
    first = scores_of(routed_folder, name, root)
    said = answers_of(root)
    assert {score.metric: score.sides[1].value for score in first.scores}[metric] == 0
    root = enter("second")
    make(root, lambda i, *_: said[i] if i % 2 else NOT_SAID)
    second = scores_of(routed_folder, name, root)
    routed = {score.metric: score.sides[1] for score in second.scores}[metric]
    assert answers_of(root) == said
    assert routed.value == pytest.approx(known)
    assert 0 < routed.skip_rate < 1
    assert routed.difference is not None


def test_pope_tells_its_rates(routed_folder, enter, say):
    """By hand: said y n y y n y, truths y y n y n n."""
    say("Yes", "no", "yes")
    root, truths = enter("first"), ("yes", "yes", "no", "yes", "no", "no")
    pope(root, lambda i, *_: truths[i])
    told = {score.metric: score.sides[1] for score in scores_of(routed_folder, "pope", root).scores}
    assert told["pope_accuracy"].value == pytest.approx(3 / 6)
    assert told["pope_precision"].value == pytest.approx(2 / 4)
    assert told["pope_recall"].value == pytest.approx(2 / 3)
    assert told["pope_f1_score"].value == pytest.approx(4 / 7)
    assert told["pope_accuracy"].difference is not None
    assert told["pope_recall"].difference is None


def test_mme_counts_pairs_in_its_two_parts(routed_folder, enter, say):
    """By hand, two questions a picture: both right, one right, and in the other part both."""
    say("Yes", "no", "Yes", "Yes", "Yes", "Yes")
    root, truths = enter("first"), ("yes", "no", "yes", "no", "yes", "yes")
    mme(root, lambda i, *_: truths[i])
    scores = {score.metric: score for score in scores_of(routed_folder, "mme", root).scores}
    assert scores["mme_perception_score"].sides[1].value == pytest.approx(((100 + 100) + (50 + 0)) / 2)
    assert scores["mme_cognition_score"].sides[1].value == pytest.approx(100 + 100)
    assert scores["mme_perception_score"].samples == COUNT
    assert all(score.sides[1].difference is None for score in scores.values()), "points are no mean over samples"


def test_mmbench_without_a_judge(routed_folder, enter):
    """Its static variant finds the option's text in the answer, where it is the only one's."""
    root = enter("first")
    mmbench(root, lambda i, *_: "A")
    scores_of(routed_folder, "mmbench_en_dev_static", root)
    meant = [[letter for letter, option in OPTIONS.items() if option in text] for text in answers_of(root)]
    root = enter("second")
    mmbench(root, lambda i, *_: meant[i][0] if len(meant[i]) == 1 and i != 5 else "E")
    scores = {score.metric: score for score in scores_of(routed_folder, "mmbench_en_dev_static", root).scores}
    right = sum(len(letters) == 1 for letters in meant[:5])
    assert right > 0
    assert scores["gpt_eval_score"].sides[1].value == pytest.approx(100 * right / COUNT)
    assert (root / "written" / "routed" / "submissions" / "mmbench_en_dev_static_results.json").is_file()


def test_scienceqa_reads_the_letter(routed_folder, enter, say):
    say("A", "B. other", "A. some")
    root = enter("first")
    scienceqa(root, lambda i, *_: "A" if i < 4 else "B")
    scores = scores_of(routed_folder, "scienceqa_img", root).scores
    assert scores[0].sides[1].value == pytest.approx(4 / 6)


def test_seedbench_by_likelihood_takes_the_way_without_messages(routed_folder, enter):
    """Tasks that compare likelihoods: the lowest loss wins, batch and route as in our own scoring."""
    root = enter("first")
    seedbench(root, lambda i, *_: "ABCD"[i % 4])
    record = scores_of(routed_folder, "seedbench_ppl", root)
    lines = [json.loads(line) for line in (root / "log" / "routed" / "samples-0.jsonl").read_text().splitlines()]
    losses = {line["id"]: line["loss"] for line in lines}
    right = 0
    for i in range(COUNT):
        of_choice = [losses[f"seedbench_ppl/test/{i}/{n}"] for n in range(4)]
        right += of_choice.index(min(of_choice)) == i % 4
        assert len(set(of_choice)) > 1
    assert {score.metric: score.sides[1].value for score in record.scores}["acc"] == pytest.approx(right / COUNT)
