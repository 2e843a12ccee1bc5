"""Guards the layouts of records: what is read, that digits round trip, and that faults name file, record, field."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from routing_experts.data.digits import DigitsTask
from routing_experts.data.images import load_image
from routing_experts.data.readers.sources import load_records
from routing_experts.data.records import Record, Turn
from routing_experts.data.writing import save_records
from routing_experts.errors import ConfigError, RecordError

PICTURED = {
    "id": "p1",
    "image": "sub/a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A kite."},
        {"from": "human", "value": "Colour?"},
        {"from": "gpt", "value": "red"},
    ],
}
TEXT = {"id": 2, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "model": "x"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "sub" / "a.png")
    return tmp_path


def write(folder, content):
    path = folder / "set.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(folder, content, **options):
    path = write(folder, content)
    with pytest.raises(RecordError) as caught:
        load_records(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def changed(**fields):
    item = copy.deepcopy(PICTURED) | fields
    return [TEXT, {key: value for key, value in item.items() if value != "absent"}]


def said(*messages):
    return changed(conversations=[{"from": speaker, "value": value} for speaker, value in messages])


def test_records_are_read_with_their_pictures_as_paths(folder):
    pictured, text = load_records(write(folder, [PICTURED, TEXT]))
    turns = (Turn("<image>\nWhat?", "A kite."), Turn("Colour?", "red"))
    assert pictured == Record("p1", turns, (folder / "sub" / "a.png",))
    assert text == Record("2", (Turn("Hi", "Ho"),), ())


def test_system_prompts_several_pictures_tasks_null_images_and_missing_ids(folder):
    several = {
        "image": ["sub/a.png", "sub/a.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image><image>Same?"},
            {"from": "gpt", "value": "yes"},
        ],
        "task": "compare",
    }
    first, second = load_records(write(folder, [several, TEXT | {"image": None, "tasks": ["greet"]}]))
    assert (first.id, first.system, len(first.images)) == ("0", "Be brief.", 2)
    assert first.turns == (Turn("<image><image>Same?", "yes", "compare"),)
    assert second.turns[0].task == "greet"


def test_another_image_root_a_limit_and_a_byte_order_mark(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write(elsewhere, b"\xef\xbb\xbf" + json.dumps([PICTURED, {"broken": True}]).encode())
    (record,) = load_records(path, folder, limit=1)
    assert record.images == (folder / "sub" / "a.png",)


def test_pictures_are_not_opened_when_records_are_loaded(folder):
    (folder / "sub" / "a.png").write_bytes(b"no picture")
    (record,) = load_records(write(folder, [PICTURED]))
    with pytest.raises(RecordError, match="no format that Pillow knows"):
        load_image(record.images[0], record.id)


@pytest.mark.parametrize("image_root", [None, "pictures"])
def test_digits_round_trip(tmp_path, image_root):
    root = tmp_path / image_root if image_root else None
    task = DigitsTask(text_share=0.3)
    records = [task[index] for index in range(12)]
    save_records(records, tmp_path / "new" / "digits.json", root)
    again = load_records(tmp_path / "new" / "digits.json", root)
    assert [(r.id, r.turns, r.system) for r in again] == [(r.id, r.turns, r.system) for r in records]
    for old, new in zip(records, again, strict=True):
        assert len(old.images) == len(new.images)
        for picture, path in zip(old.images, new.images, strict=True):
            assert isinstance(path, Path)
            assert np.array_equal(np.asarray(load_image(path, new.id)), np.asarray(picture))
    assert [path.name for path in (tmp_path / "new").glob("*.tmp")] == []


def test_files_below_the_image_root_are_named_not_copied(folder):
    record = Record("ä", (Turn("<image>Größe?", "🙂"),), (folder / "sub" / "a.png",), "kurz")
    save_records([record], folder / "out.json")
    assert json.loads((folder / "out.json").read_text(encoding="utf-8"))[0]["image"] == "sub/a.png"
    assert list(load_records(folder / "out.json")) == [record]


def test_saving_what_could_not_be_loaded_is_refused_and_leaves_the_old_file(folder, tmp_path_factory):
    path = write(folder, [TEXT])
    before = path.read_bytes()
    good = Record("good", (Turn("Hi", "Ho"),))
    outside = tmp_path_factory.mktemp("outside") / "b.png"
    Image.new("RGB", (2, 2)).save(outside)
    bad = {
        "the answer is empty": Record("b", (Turn("Hi", ""),)),
        "0 pictures, but the questions have 1": Record("b", (Turn("<image>", "x"),)),
        "lies outside the image folder": Record("b", (Turn("<image>", "x"),), (outside,)),
        "is not there": Record("b", (Turn("<image>", "x"),), (folder / "none.png",)),
        "leaves the image folder": Record("b", (Turn("<image>", "x"),), (folder / "sub" / ".." / "sub" / "a.png",)),
    }
    for message, record in bad.items():
        with pytest.raises(RecordError, match=message) as caught:
            save_records([good, record], path)
        assert "record 1 (id 'b')" in str(caught.value)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([TEXT, "text"], "record 1: it is text, but a record is an object"),
        (changed(id=[1]), "record 1, field id: it is a list"),
        (changed(id=True), "record 1, field id: it is true or false"),
        (changed(conversations="absent"), "record 1 (id 'p1'), field conversations: it is missing or null"),
        (changed(conversations=[]), "field conversations: it is empty"),
        (changed(conversations={"from": "human"}), "field conversations: it is an object"),
        (changed(conversations=["hi"]), "conversations[0]: it is text, but a message is an object"),
        (said(("user", "x"), ("gpt", "y")), "conversations[0].from: it is 'user', but it must be one of human, gpt"),
        (said(("human", None), ("gpt", "y")), "conversations[0].value: it is missing or null"),
        (said(("human", 3), ("gpt", "y")), "conversations[0].value: it is a number (3)"),
        (said(("human", "\ud800"), ("gpt", "y")), "conversations[0].value: character 0 is half of a surrogate pair"),
        (said(("gpt", "x"), ("human", "y")), "conversations[0].from: it is 'gpt' where 'human' must speak"),
        (said(("human", "x"), ("human", "y")), "conversations[1].from: it is 'human' where 'gpt' must speak"),
        (said(("system", "x"), ("gpt", "y")), "conversations[1].from: it is 'gpt' where 'human' must speak"),
        (said(("human", "x"), ("gpt", "y"), ("system", "z")), "conversations[2].from: it is 'system' where 'human'"),
        (said(("human", "<image>x")), "the last question has no answer (1 messages)"),
        (said(("human", "<image>x"), ("gpt", "y"), ("human", "z")), "the last question has no answer (3 messages)"),
        (said(("system", "x")), "the last question has no answer (0 messages)"),
        (said(("human", "<image>x"), ("gpt", " \n")), "conversations[1].value: the answer is empty"),
        (said(("human", "x"), ("gpt", "y")), "field image: 1 pictures, but the questions have 0 <image>"),
        (changed(image="absent"), "field image: 0 pictures, but the questions have 1 <image>"),
        (changed(image=["sub/a.png"] * 2), "field image: 2 pictures, but the questions have 1 <image>"),
        (said(("human", "x"), ("gpt", "<image>")), "conversations[1].value: <image> stands in a message from gpt"),
        (
            said(("system", "<image>"), ("human", "x"), ("gpt", "y")),
            "conversations[0].value: <image> stands in a message from system",
        ),
        (changed(image=""), "field image: it is ''"),
        (changed(image=[]), "field image: it is []"),
        (changed(image=[3]), "field image: it is [3]"),
        (changed(image="../a.png"), "field image: '../a.png' leaves the image folder"),
        (changed(image="sub/../../a.png"), "leaves the image folder"),
        (changed(image="sub\\..\\..\\a.png"), "leaves the image folder"),
        (changed(image="/etc/passwd"), "field image: '/etc/passwd' leaves the image folder"),
        (changed(image="C:\\a.png"), "leaves the image folder"),
        (changed(image="a\0.png"), "leaves the image folder"),
        (changed(image="\ud800.png"), "field image: character 0 is half of a surrogate pair"),
        (changed(id="\ud800"), "record 1, field id: character 0 is half of a surrogate pair"),
        (changed(image={"bytes": "abc"}), "field image: it is {'bytes': 'abc'}"),
        (changed(image={"path": 5}), "field image: it is {'path': 5}"),
        (changed(image={"path": "../a.png"}), "'../a.png' leaves the image folder"),
        (changed(image="sub/none.png"), "none.png is not there. Correct the path"),
        (changed(image="sub"), "sub is a folder, not a picture"),
        (changed(image="n" * 5000), "Correct the path"),
        (changed(tasks=["one"]), "field tasks: it is ['one'], but it must list one name for each of the 2 turns"),
        (changed(tasks="one"), "field tasks: it is 'one'"),
        (changed(task=3), "field task: it is a number (3)"),
    ],
)
def test_faults_are_named(folder, content, message):
    assert message in refusal(folder, content)


CHAT = {
    "id": "c1",
    "images": ["sub/a.png"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A kite."}]},
    ],
}


def test_chat_messages_are_the_same_record_as_llava_s(folder):
    """Parts and text with placeholders; the column of pictures may be empty."""
    written = copy.deepcopy(CHAT)
    written["messages"][1]["content"] = "<image>What?"
    text = {"images": [], "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    first, second, third = load_records(write(folder, [CHAT, written, text]))
    assert first == second == Record("c1", (Turn("<image>What?", "A kite."),), (folder / "sub" / "a.png",), "Be brief.")
    assert third == Record("2", (Turn("Hi", "Ho"),))


def test_nulls_are_fields_that_are_not_there(folder):
    """As columns of a table that other rows fill."""
    empty = dict.fromkeys(("id", "image", "file_name", "conversations", "task", "tasks"))
    assert next(iter(load_records(write(folder, [CHAT | empty])))).id == "0"


def test_a_folder_with_metadata_is_a_source(folder):
    """Its pictures are beside it, and named as `datasets` has them named."""
    rows = [
        {"file_name": "sub/a.png", "messages": CHAT["messages"]},
        {"file_names": ["sub/a.png"], "conversations": PICTURED["conversations"]},
    ]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    first, second = load_records(folder)
    assert first.images == second.images == (folder / "sub" / "a.png",)
    assert [first.id, second.id] == ["0", "1"]
    assert load_records(folder)[1] == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": []}, "fields messages and conversations: it has two conversations"),
        ({"image": "sub/a.png"}, "fields image and images: both name pictures"),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            "messages[0].role: it is 'human', but it must be one of user",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]: it is {'type'"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]: it is 3"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: it is missing or null"),
    ],
)
def test_faults_of_chat_messages_are_named(folder, change, message):
    assert message in refusal(folder, [CHAT | change])


def test_unreadable_paths_and_limits_are_refused(folder):
    with pytest.raises(RecordError, match=r"none\.json: there is no such file"):
        load_records(folder / "none.json")
    with pytest.raises(RecordError, match=r"neither metadata\.jsonl nor parquet files"):
        load_records(folder)
    with pytest.raises(ConfigError, match="limit=0: it is a count of at least 1"):
        load_records(write(folder, [TEXT]), limit=0)
