"""Instruction sets at full size: checking and halving 665,000 records, and whether loading starves training.

``python benchmarks/mixture.py --json RECORD`` writes a set of the real one's records and bytes whose pictures are cuts
of scikit-image's photographs as JPEG, then times each verb in a process of its own, beside ``json.load`` of the same
file.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from skimage import data as photographs
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, LlavaProcessor

from routing_experts.data.collate import Collator
from routing_experts.data.dataset import EncodedDataset
from routing_experts.data.encode import Encoder
from routing_experts.data.mixture.export import TEXT_SHARE, folder_of
from routing_experts.data.readers.sources import load_records
from routing_experts.data.square import padding_to_square
from routing_experts.data.writing import RecordWriter
from routing_experts.models.load import load_processor
from routing_experts.records import environment, save_json, sha256_of

ROOT = Path(__file__).parents[1]
RECORDS, PICTURES = 665_000, 2000
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
SIDES = (480, 640)  # of COCO's pictures
ANSWER_WORDS = (2, 8, 30, 90)  # a word, a phrase, a sentence, a paragraph
LOADED, WORKERS = 1500, 2
ROUNDS = 3


def write_pictures(folder: Path, count: int, seed: int) -> None:
    """Cuts of the photographs, and more names of the same files: every record names one of its own."""
    draw = random.Random(seed)
    whole = [Image.fromarray(getattr(photographs, name)()).convert("RGB") for name in NAMES]
    for number in range(PICTURES):
        picture = draw.choice(whole)
        width, height = (min(side, limit) for side, limit in zip(draw.sample(SIDES, 2), picture.size, strict=True))
        left, top = draw.randint(0, picture.width - width), draw.randint(0, picture.height - height)
        path = folder / name_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.crop((left, top, left + width, top + height)).save(path, "JPEG", quality=85)
    for number in range(PICTURES, count):
        path = folder / name_of(number)
        if not path.exists():
            path.hardlink_to(folder / name_of(number % PICTURES))


def name_of(number: int) -> str:
    """A picture's place in the mixture's layout."""
    return f"{folder_of(number)}/{number:012d}.jpg"


def write_records(path: Path, count: int, seed: int) -> None:
    """So many dialogues of random words, about 1.5 KB each."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(4000)]

    def said(number: int) -> str:
        return " ".join(draw.choices(words, k=number))

    with RecordWriter(path) as writer:
        for number in range(count):
            turns = [(said(10), said(draw.choice(ANSWER_WORDS))) for _ in range(draw.choice((1, 2, 4, 8)))]
            item: dict[str, Any] = {"id": f"{number:012d}"}
            if draw.random() >= TEXT_SHARE:
                item["image"] = name_of(number)
                turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
            pairs = ((("human", question), ("gpt", answer)) for question, answer in turns)
            item["conversations"] = [{"from": who, "value": text} for pair in pairs for who, text in pair]
            writer.add(item)


def run(*command: str | Path) -> dict[str, float]:
    """A command's seconds and the most memory that it, or a process of its own, took."""
    code = (
        "import resource, subprocess, sys, time; started = time.monotonic();"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.returncode)"
    )
    said = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=True)
    seconds, peak, failed = said.stdout.split()
    assert failed == "0", command
    unit = 1024 if sys.platform == "linux" else 1
    return {"seconds": float(seconds), "peak_bytes": int(peak) * unit}


def reading(path: Path, images: Path) -> dict[str, Any]:
    """Checking beside reading it all with json, taking turns."""
    check = (sys.executable, "-m", "routing_experts", "-q", "data", "check", path, "--images", images, "--workers", "2")
    load = (sys.executable, "-c", "import json, sys; json.load(open(sys.argv[1]))", path)
    found: dict[str, list[dict[str, float]]] = {"check": [], "json.load": []}
    for _ in range(ROUNDS):
        found["check"].append(run(*check))
        found["json.load"].append(run(*load))
    return {"bytes": path.stat().st_size, **found}


def halving(path: Path, small: Path) -> dict[str, Any]:
    """The same half twice, and that of a tenth of the set."""
    rows = []
    for number, source in enumerate((path, path, small)):
        target = path.with_name(f"half-{number}.json")
        measured = run(sys.executable, "-m", "routing_experts", "-q", "data", "subset", source, "--output", target)
        rows.append({"bytes": source.stat().st_size, "sha256": sha256_of(target), **measured})
        target.unlink()
    return {"halves": rows}


def loading(path: Path, images: Path) -> dict[str, Any]:
    """Dialogues a second, decoded, padded to squares of 336 pixels and tokenised, with no worker and with two."""
    pocket = load_processor("pocket")
    side = {"height": 336, "width": 336}
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side)
    processor = padding_to_square(
        LlavaProcessor(
            image_processor=clip,
            tokenizer=pocket.tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            image_token=pocket.image_token,
            num_additional_image_tokens=1,
        )
    )
    encoder = Encoder(processor, "vicuna_v1", 100_000)
    dataset = EncodedDataset(load_records(path, images, LOADED), LOADED, encoder, keep=False)
    rows = {}
    for workers in (0, WORKERS):
        loader = DataLoader(dataset, 16, collate_fn=Collator(0), num_workers=workers)
        started, count = 0.0, 0
        for number, batch in enumerate(loader):
            if number == 2 * WORKERS:  # what workers had ready when they began
                started = time.monotonic()
            count += len(batch["input_ids"]) if number > 2 * WORKERS else 0
        rows[str(workers)] = count / (time.monotonic() - started)
    return {"dialogues_a_second": rows, "pixels": 336, "batch_size": 16}


def main() -> None:
    """Writes the set, measures, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/bench/mixture")
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/mixture.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    path, small = asked.folder / "mix.json", asked.folder / "tenth.json"
    write_pictures(asked.folder, asked.records, 0)
    write_records(path, asked.records, 1)
    write_records(small, asked.records // 10, 1)
    record = {"records": asked.records, "pictures": PICTURES, **reading(path, asked.folder), **halving(path, small)}
    record |= {"loading": loading(small, asked.folder), "environment": environment()}
    save_json(asked.json, record)


if __name__ == "__main__":
    main()
