"""``roe chat``: questions from a pipe or a terminal, a route under each answer, JSON a line a turn."""

import io
import json
import sys

import pytest
from PIL import Image


@pytest.fixture
def say(monkeypatch):
    """Puts lines on standard input, as a pipe or as a terminal."""

    def put(*lines: str, terminal: bool = False) -> None:
        stream = io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
        monkeypatch.setattr(sys, "stdin", stream)

    return put


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "white").save(path)
    return path


def test_answers_have_their_routes_under_them(roe, routed_run, say, picture):
    """Guards a piped dialogue with a picture; blank lines ask nothing."""
    say("Read all digits.", "", "Is there a 7?")
    code, out, complaint = roe(
        "chat", routed_run, "--image", picture, "--policy", "project", "--max-new-tokens", "3", "--keep-bias", "1000"
    )
    assert code == 0
    strips = [line for line in out.splitlines() if "layers skipped" in line]
    assert [strip.split()[0] for strip in strips] == ["■" * 12] * 2
    assert "0 kept from before" in strips[0]
    assert "0 kept from before" not in strips[1]
    assert ">" not in complaint  # a prompt is for terminals


def test_each_turn_is_one_line_of_json(roe, routed_run, say, picture):
    """Guards programs that talk to it, pictures of later turns among them."""
    say("Add 3 and 4.", f"/image {picture}", "Read all digits.")
    code, out, _ = roe("chat", routed_run, "--max-new-tokens", "3", "--keep-bias", "1000", "--json")
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert first["question"] == "Add 3 and 4."
    assert first["answer"]
    assert len(first["route"]) == 12
    assert second["prefilled_tokens"] > first["prefilled_tokens"] + 16  # its picture, and the dialogue again
    assert {"skip_rate", "reused_tokens", "new_tokens", "seconds", "cache_bytes"} <= second.keys()


def test_a_mistake_ends_a_pipe_but_not_a_dialogue_at_the_terminal(roe, routed_run, say):
    """Guards long dialogues against mistyped paths, and scripts against going on behind one."""
    lines = ("/image none.png", "Read all digits.", "Add 3 and 4.")
    say(*lines)
    code, out, complaint = roe("chat", routed_run, "--max-new-tokens", "3")
    assert (code, out) == (1, "")
    assert complaint.count("none.png") == 1
    say(*lines, terminal=True)
    code, out, complaint = roe("chat", routed_run, "--max-new-tokens", "3")
    assert code == 0
    assert complaint.count("none.png") == 1
    assert out.count("layers skipped") == 1
    assert complaint.count("> ") == 4


def test_an_unknown_policy_is_one_message(roe, routed_run, say):
    say("Read all digits.")
    code, _, complaint = roe("chat", routed_run, "--policy", "again")
    assert code == 1
    assert "prefill, project" in complaint
