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

import psutil
import torch
from accelerate.data_loader import SeedableRandomSampler
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
from routing_experts.records import digest_of, environment, save_json
from routing_experts.training.order import StepOrder

ROOT = Path(__file__).parents[1]
RECORDS, PICTURES = 665_000, 2000
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
SIDES = (480, 640)  # of COCO's pictures
ANSWER_WORDS = (2, 8, 30, 90)  # a word, a phrase, a sentence, a paragraph
LOADED, WORKERS, BATCH, PIXELS = 1500, 2, 16, 336
GROUPED, A_STEP, WINDOWS = 12_800, 128, (1, 4)
ROUNDS = 3
EVERY = 0.05  # seconds between two looks at memory


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
    """A command's seconds, and the most memory of it and its processes together, what they share counted for each."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            peak = max(peak, held_by(running.pid))
            time.sleep(EVERY)
        seconds = time.monotonic() - started
    assert running.returncode == 0, command
    return {"seconds": seconds, "peak_bytes": peak}


def held_by(number: int) -> int:
    """The resident memory of a process and all below it, in bytes; 0 where it has just ended."""
    try:
        root = psutil.Process(number)
        return sum(process.memory_info().rss for process in (root, *root.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


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
        rows.append({"bytes": source.stat().st_size, "sha256": digest_of([target]), **measured})
        target.unlink()
    return {"halves": rows}


def llava_processor() -> Any:
    """LLaVA-1.5's pictures, 576 tokens each, with the pocket model's tokenizer."""
    pocket = load_processor("pocket")
    side = {"height": PIXELS, "width": PIXELS}
    clip = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=side)
    return padding_to_square(
        LlavaProcessor(
            image_processor=clip,
            tokenizer=pocket.tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            image_token=pocket.image_token,
            num_additional_image_tokens=1,
        )
    )


def loading(path: Path, images: Path, encoder: Encoder) -> dict[str, Any]:
    """Dialogues a second, decoded, padded to squares of 336 pixels and tokenised, with no worker and with two."""
    dataset = dataset_of(path, images, encoder, LOADED)
    found: dict[str, list[float]] = {"0": [], str(WORKERS): []}
    for _ in range(ROUNDS):
        for workers, rates in found.items():
            rates.append(dialogues_a_second(dataset, int(workers)))
    return {"dialogues_a_second": found, "pixels": PIXELS, "batch_size": BATCH}


def dataset_of(path: Path, images: Path, encoder: Encoder, limit: int) -> EncodedDataset:
    """So many of a set's first dialogues, in whole steps, encoded each time that they are asked for."""
    records = load_records(path, images, limit)
    return EncodedDataset(records, len(records) // A_STEP * A_STEP, encoder, keep=False)


def dialogues_a_second(dataset: EncodedDataset, workers: int) -> float:
    """Of batches behind those that workers had ready when the clock started."""
    started, count = 0.0, 0
    for number, batch in enumerate(DataLoader(dataset, BATCH, collate_fn=Collator(0), num_workers=workers)):
        if number == 2 * WORKERS:
            started = time.monotonic()
        count += len(batch["input_ids"]) if number > 2 * WORKERS else 0
    return count / (time.monotonic() - started)


def padding(path: Path, images: Path, encoder: Encoder) -> dict[str, Any]:
    """The share of a batch's tokens that is padding: shuffled, and grouped as training does, a step at a time or four.

    A step is what LLaVA-1.5 takes, 128 dialogues in batches of 16.
    """
    dataset = dataset_of(path, images, encoder, GROUPED)
    extents = [dataset.extent(index, exact=True) for index in range(len(dataset))]
    lengths = [length for _, length in extents]
    shuffled = list(SeedableRandomSampler(extents, data_seed=0))
    found = {"shuffled": padded_share(shuffled, lengths)}
    for window in WINDOWS:
        sampler = SeedableRandomSampler(extents, data_seed=0)
        # As training does, whose sets are too large to keep: within a step by characters, over several by tokens.
        size = dataset.extent if window == 1 else extents.__getitem__
        order = StepOrder(sampler, BATCH, A_STEP // BATCH, 1, size, window)
        found[f"window {window}"] = padded_share(list(order), lengths)
    return {"padded_share": found, "dialogues": len(dataset), "batch_size": BATCH, "a_step": A_STEP}


def padded_share(order: list[int], lengths: list[int]) -> float:
    """Of all tokens of batches that take dialogues in this order."""
    batches = [[lengths[index] for index in order[start : start + BATCH]] for start in range(0, len(order), BATCH)]
    whole = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / whole


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
    encoder = Encoder(llava_processor(), "vicuna_v1", 100_000)
    record |= {"loading": loading(small, asked.folder, encoder), "padding": padding(small, asked.folder, encoder)}
    record |= {"environment": environment()}
    save_json(asked.json, record)


if __name__ == "__main__":
    main()
