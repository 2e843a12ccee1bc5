"""What goes wrong is told by the sample's name, and what was finished stays: no failure is scored as an answer."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from routing_experts.errors import CheckpointError, EvaluationError, RouteError
from routing_experts.evaluation.lmms.loading import _quantised
from routing_experts.evaluation.lmms.samples import by_answer
from routing_experts.models.load import check_processor, load_base, load_processor

UTILS = """
from PIL import Image

def shown(doc):
    if doc["image"] is None:
        return []
    return [{"type": "audio", "url": doc["image"]}] if doc["image"].endswith(".wav") else [doc["image"]]

def asked(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def scored(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""
YAML = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: data.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.shown
doc_to_text: !function utils.asked
doc_to_target: answer
{more}
"""
GENERATION = """generation_kwargs: {max_new_tokens: 4, do_sample: false%s}
process_results: !function utils.scored
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def task(folder, rows, kind="generate_until", more=GENERATION % ""):
    folder.mkdir(exist_ok=True)
    (folder / "utils.py").write_text(UTILS)
    (folder / "mine.yaml").write_text(YAML.format(kind=kind, more=more))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(folder, count=6, **changes):
    picture = folder / "one.png"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "gray").save(picture)
    found = [{"image": str(picture), "question": f"Read digit {n}.", "answer": str(n)} for n in range(count)]
    for number, change in changes.items():
        found[int(number[1:])] |= change
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_broken_picture_fails_the_run_and_keeps_what_was_finished(batch_size, run, routed_folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    folder = task(tmp_path / "t", rows(tmp_path, n5={"image": str(tmp_path / "broken.png")}))
    settings = {"pretrained": routed_folder, "log": tmp_path / "log"}
    with pytest.raises(EvaluationError, match=r"sample mine/test/5 cannot be read: .*broken.png"):
        run(settings, "mine", folder, batch_size=batch_size)
    kept = [json.loads(line)["id"] for line in (tmp_path / "log" / "samples-0.jsonl").read_text().splitlines()]
    assert kept == [f"mine/test/{n}" for n in range(5)], "that before it in its batch is asked"
    task(tmp_path / "t", rows(tmp_path))
    assert len(run(settings, "mine", folder, batch_size=batch_size)["samples"]["mine"]) == 6
    assert len((tmp_path / "log" / "samples-0.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "there/is/none.png"}, "none.png is not there"),
        ({"image": "speech.wav"}, "shows audio"),
    ],
)
def test_what_cannot_be_shown_is_named(change, message, run, routed_folder, tmp_path):
    folder = task(tmp_path / "t", rows(tmp_path, n1=change))
    with pytest.raises(EvaluationError, match=rf"mine/test/1 .*{message}"):
        run({"pretrained": routed_folder}, "mine", folder)


def test_a_failure_within_a_batch_names_its_sample(run, routed_folder, tmp_path):
    """Guards against 'something in this batch': the one whose prompt the model cannot take is found."""
    folder = task(tmp_path / "t", rows(tmp_path, n2={"question": "digits " * 2100}))
    with pytest.raises(EvaluationError, match=r"sample mine/test/2 could not be answered: .*tokens"):
        run({"pretrained": routed_folder, "log": tmp_path / "log"}, "mine", folder, batch_size=4)
    assert len((tmp_path / "log" / "samples-0.jsonl").read_text().splitlines()) == 2


def test_a_model_s_own_exception_is_no_empty_answer(run, routed_folder, digits, monkeypatch):
    from routing_experts.evaluation.lmms import model as model_module

    def broken(*args, **kwargs):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(model_module, "answer", broken)
    with pytest.raises(EvaluationError, match=r"sample roe_digits/test/0 .*cannot be multiplied"):
        run({"pretrained": routed_folder}, "roe_digits", digits, batch_size=8)


def test_memory_that_runs_out_says_what_helps(run, routed_folder, digits, monkeypatch):
    from routing_experts.evaluation.lmms import model as model_module

    def greedy(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(model_module, "answer", greedy)
    with pytest.raises(EvaluationError, match=r"out of memory with samples .*Lower batch_size"):
        run({"pretrained": routed_folder}, "roe_digits", digits, batch_size=8)


def shown(questions, folder, wanted):
    """A row of the digits whose answer is of a kind."""
    question = next(one for one in questions if one.record.images and wanted(one.answer))
    path = folder / "shown.png"
    question.record.images[0].save(path)
    text = question.record.turns[0].question.replace("<image>\n", "")
    return {"image": str(path), "question": text, "answer": question.answer}


def test_a_model_that_says_nothing_is_refused(run, routed_folder, questions, tmp_path, caplog):
    """An answer that is empty is an answer; a run of nothing else is a model asked wrongly."""
    no_digits = GENERATION % f", until: {json.dumps(list('0123456789'))}"
    folder = task(tmp_path / "t", rows(tmp_path), more=no_digits)
    with pytest.raises(EvaluationError, match="all 6 answers to mine are empty, mine/test/0's among them"):
        run({"pretrained": routed_folder}, "mine", folder)
    said_in_words = shown(questions, tmp_path, lambda answer: answer == "yes")
    folder = task(tmp_path / "t", rows(tmp_path, n0=said_in_words), more=no_digits)
    said = run({"pretrained": routed_folder}, "mine", folder)["samples"]["mine"]
    assert [bool(sample["filtered_resps"][0]) for sample in said] == [True] + [False] * 5
    assert "5 of 6 answers are empty" in caplog.text


def test_texts_that_end_an_answer_are_cut(run, routed_folder, questions, tmp_path):
    row = shown(questions, tmp_path, lambda answer: answer.isdigit() and len(answer) > 2)
    folder = task(tmp_path / "t", rows(tmp_path, n0=row))
    whole = run({"pretrained": routed_folder}, "mine", folder)["samples"]["mine"][0]["filtered_resps"][0]
    end = next(place for place in range(1, len(whole)) if whole[place] not in whole[:place])
    task(tmp_path / "t", rows(tmp_path, n0=row), more=GENERATION % f', until: ["{whole[end]}"]')
    cut = run({"pretrained": routed_folder}, "mine", folder)["samples"]["mine"][0]
    assert cut["filtered_resps"][0] == whole[:end]
    assert cut["token_counts"][0]["output_tokens"] == end + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained": "pocket"}, "has no RoE parts"),
        ({"dense": True}, "is routed, but dense=True"),
        ({"pretrained": "pocket", "dense": True, "skip_ratio": 0}, "a dense model has no routers"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"max_frames": 0}, "max_frames=0"),
    ],
)
def test_a_model_that_does_not_fit_what_was_asked_is_refused(settings, message, run, routed_folder, digits):
    with pytest.raises(EvaluationError, match=message):
        run({"pretrained": routed_folder} | settings, "roe_digits", digits)


def test_a_batch_size_that_shall_be_found_is_refused(run, routed_folder, digits):
    with pytest.raises(EvaluationError, match="batch_size='auto'"):
        run({"pretrained": routed_folder}, "roe_digits", digits, batch_size="auto")


def test_a_processor_that_makes_other_pictures_is_another_model(run, routed_folder, digits, tmp_path):
    """Guards old answers to padded pictures against passing for answers to cropped ones."""
    settings = {"pretrained": tmp_path / "model", "log": tmp_path / "log"}
    shutil.copytree(routed_folder, tmp_path / "model")
    run(settings, "roe_digits", digits, batch_size=8, limit=2)
    path = tmp_path / "model" / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    path.write_text(json.dumps(config))
    with pytest.raises(EvaluationError, match=r"asked otherwise \(processor: "):
        run(settings, "roe_digits", digits, batch_size=8, limit=2)


def test_packed_weights_are_told_apart():
    """A quantised model has no fingerprint to compare with others, and its samples must not pass for another's."""
    one, other = (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for layer, value in ((one, 1), (other, 2)):
        layer.weight = torch.nn.Parameter(torch.full((2, 2), value, dtype=torch.uint8), requires_grad=False)
    assert _quantised(one) != _quantised(other)
    other.load_state_dict(one.state_dict())
    assert _quantised(one) == _quantised(other)


@pytest.mark.parametrize("change", [{"skip_ratio": 0}, {"pretrained": "pocket", "dense": True}, {"max_frames": 2}])
def test_samples_of_another_model_are_not_mixed_in(change, run, routed_folder, digits, tmp_path):
    settings = {"pretrained": routed_folder, "log": tmp_path / "log"}
    run(settings, "roe_digits", digits, batch_size=8, limit=2)
    with pytest.raises(EvaluationError, match="samples that were asked otherwise"):
        run(settings | change, "roe_digits", digits, batch_size=8, limit=2)
    run(settings, "roe_digits", digits, batch_size=1, limit=2)  # what memory allows is no other question


def test_a_log_that_is_damaged_is_named(run, routed_folder, digits, tmp_path):
    settings = {"pretrained": routed_folder, "log": tmp_path / "log"}
    run(settings, "roe_digits", digits, batch_size=8, limit=3)
    path = tmp_path / "log" / "samples-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "oops\n" + lines[2])
    with pytest.raises(EvaluationError, match=r"samples-0.jsonl, line 2 is not JSON"):
        run(settings, "roe_digits", digits, batch_size=8, limit=3)
    (tmp_path / "log" / "asked.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"asked.json is not JSON"):
        run(settings, "roe_digits", digits, batch_size=8, limit=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="cannot hold samples"):
        run(settings | {"log": tmp_path / "file"}, "roe_digits", digits, limit=3)


def test_another_model_s_processor_is_refused():
    model, processor = load_base("pocket"), load_processor("pocket")
    check_processor(model, processor)
    model.config.image_token_id = 7
    with pytest.raises(CheckpointError, match="for pictures, with a model that reads them at 7"):
        check_processor(model, processor)
    model = load_base("pocket")
    model.resize_token_embeddings(300)
    with pytest.raises(CheckpointError, match="of 330 tokens, with a model of 300"):
        check_processor(model, processor)


def test_answers_without_questions_are_refused():
    class Instance:
        args = ("", "a choice")
        task_name = "choices"

    with pytest.raises(EvaluationError, match="acc_mutual_info"):
        by_answer(Instance(), {}, 1)


def test_several_rounds_are_refused(routed_folder):
    from routing_experts.evaluation.lmms.model import ChatModel

    model = ChatModel(str(routed_folder), device="cpu")

    class Request:
        task_name = "rounds"

    with pytest.raises(EvaluationError, match="task rounds asks in several rounds"):
        model.generate_until_multi_round([Request()])


@pytest.mark.parametrize("simple", [False, True])
def test_a_video_is_shown_as_pictures(simple, run, routed_folder, tmp_path, monkeypatch):
    """So many frames as asked for, in order, each a picture of the prompt."""
    av = pytest.importorskip("av")
    from routing_experts.evaluation.lmms import model as model_module

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for index in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (20 * index,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    shown = []
    answer = model_module.answer

    def watched(model, processor, records, *args, **kwargs):
        shown.extend(records)
        return answer(model, processor, records, *args, **kwargs)

    monkeypatch.setattr(model_module, "answer", watched)
    folder = task(tmp_path / "t", rows(tmp_path, count=2, n1={"image": str(path)}))
    run({"pretrained": routed_folder, "max_frames": 3}, "mine", folder, simple=simple, batch_size=2)
    assert [len(record.images) for record in shown] == [1, 3]
    assert shown[1].turns[0].question == "<image>\n<image>\n<image>\nRead digit 1."
    bright = [sum(image.getpixel((16, 16))) for image in shown[1].images]
    assert bright == sorted(bright)


def test_an_error_of_the_device_blames_no_sample(run, routed_folder, digits, monkeypatch):
    """After it nothing runs: asked alone, the first sample of the batch would seem to be the one."""
    from routing_experts.evaluation.lmms import model as model_module

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(model_module, "answer", broken)
    with pytest.raises(EvaluationError, match="samples roe_digits/test/0 to roe_digits/test/7 could not"):
        run({"pretrained": routed_folder}, "roe_digits", digits, batch_size=8)


@pytest.mark.parametrize("change", [{"skip_ratio": 0.4}, {"keep_bias": "nan"}])
def test_what_the_model_cannot_do_is_refused_before_any_sample(change, run, routed_folder, digits, tmp_path):
    with pytest.raises((EvaluationError, RouteError)):
        run({"pretrained": routed_folder, "log": tmp_path / "log"} | change, "roe_digits", digits)
    assert not (tmp_path / "log").exists()


def test_placeholders_in_a_text_are_places_or_words(run, routed_folder, tmp_path, monkeypatch):
    """A text that names as many pictures as there are says where they stand; otherwise the word stands for nothing."""
    from routing_experts.evaluation.lmms import model as model_module

    shown = []
    answer = model_module.answer

    def watched(model, processor, records, *args, **kwargs):
        shown.extend(record.turns[0].question for record in records)
        return answer(model, processor, records, *args, **kwargs)

    monkeypatch.setattr(model_module, "answer", watched)
    places = {"question": "In <image>, read digit 1."}
    words = {"question": "What does <image> or <image> mean?"}
    folder = task(tmp_path / "t", rows(tmp_path, count=2, n0=places, n1=words))
    for simple in (False, True):
        run({"pretrained": routed_folder}, "mine", folder, simple=simple, batch_size=2)
    assert shown[0].split() == shown[2].split() == ["In", "<image>,", "read", "digit", "1."]
    assert shown[1] == shown[3] == "<image>\nWhat does (image) or (image) mean?"


def test_a_batch_that_fails_though_its_samples_do_not_says_why(run, routed_folder, digits, tmp_path, monkeypatch):
    """The answers that they get alone are kept: the next run has nothing to ask."""
    from routing_experts.evaluation.lmms import model as model_module

    answer = model_module.answer

    def fails_together(model, processor, records, *args, **kwargs):
        if len(records) > 1:
            raise AssertionError("rows of unlike lengths")
        return answer(model, processor, records, *args, **kwargs)

    monkeypatch.setattr(model_module, "answer", fails_together)
    settings = {"pretrained": routed_folder, "log": tmp_path / "log"}
    with pytest.raises(EvaluationError, match=r"together \(AssertionError: rows of unlike lengths\), though each"):
        run(settings, "roe_digits", digits, batch_size=8, limit=8)
    assert len(run(settings, "roe_digits", digits, batch_size=8, limit=8)["samples"]["roe_digits"]) == 8


@pytest.mark.parametrize(
    ("more", "said"),
    [("", "error: sample mine/test/1 c"), (",skipratio=0.3", "unexpected keyword argument 'skipratio'")],
)
def test_lmms_eval_s_command_ends_with_an_error(more, said, routed_folder, tmp_path):
    """It logs any exception and exits with 0, as if nothing were wrong."""
    folder = task(tmp_path / "t", rows(tmp_path, n1={"image": "there/is/none.png"}))
    command = [sys.executable, "-m", "lmms_eval", "--model", "roe", "--model_args", f"pretrained={routed_folder}{more}"]
    done = subprocess.run(
        [*command, "--tasks", "mine", "--include_path", str(folder), "--device", "cpu", "--batch_size", "2"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 1
    assert said in done.stderr
