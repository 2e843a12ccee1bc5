"""Guards the order that records train in: a step's records stay its own, and its batches are of like lengths."""

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from routing_experts.data.dataset import EncodedDataset
from routing_experts.data.digits import DigitsTask
from routing_experts.data.encode import Encoder
from routing_experts.data.records import Record, Turn
from routing_experts.models.load import load_processor
from routing_experts.training.order import StepOrder

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))


def shuffle(size: int) -> SeedableRandomSampler:
    return SeedableRandomSampler(range(size), data_seed=7)


def steps(indices: Iterator[int], size: int) -> list[list[int]]:
    found = []
    while step := list(islice(indices, size)):
        found.append(step)
    return found


def extents_of(draw, count: int) -> list[tuple[bool, int]]:
    return [(draw.random() < 0.5, draw.randint(1, 9)) for _ in range(count)]


@given(SIZES, st.randoms(use_true_random=False), st.integers(0, 3))
def test_a_step_keeps_its_records_in_any_division(sizes: tuple[int, int, int, int], draw, epoch: int) -> None:
    """Against a shuffle of its own: accelerate's epoch, cut into steps, is what trains."""
    batch_size, batches, processes, num_steps = sizes
    a_step = batch_size * batches * processes
    extents = extents_of(draw, a_step * num_steps)
    order = StepOrder(shuffle(len(extents)), batch_size, batches, processes, extents.__getitem__)
    plain = shuffle(len(extents))
    for one in (order, plain):
        one.set_epoch(epoch)

    found, expected = steps(iter(order), a_step), steps(iter(plain), a_step)

    assert len(order) == len(extents)
    assert [sorted(step) for step in found] == [sorted(step) for step in expected]


@given(SIZES, st.randoms(use_true_random=False))
def test_batches_are_of_like_lengths_and_dealt_out_evenly(sizes: tuple[int, int, int, int], draw) -> None:
    """What is summed later is never longer than what came before; processes get equal shares of each."""
    batch_size, batches, processes, _ = sizes
    extents = extents_of(draw, batch_size * batches * processes)
    order = StepOrder(shuffle(len(extents)), batch_size, batches, processes, extents.__getitem__)

    found = [[extents[index] for index in batch] for batch in BatchSampler(order, batch_size, drop_last=True)]

    rounds = [found[start : start + processes] for start in range(0, len(found), processes)]
    assert len(rounds) == batches
    for earlier, later in pairwise(rounds):
        assert min(map(min, earlier)) >= max(map(max, later))
    for together in rounds:
        ranked = sorted((extent for batch in together for extent in batch), reverse=True)
        assert together == [ranked[process::processes] for process in range(processes)]


@given(SIZES, st.randoms(use_true_random=False), st.integers(2, 4))
def test_a_window_s_steps_are_alike_however_they_are_divided(
    sizes: tuple[int, int, int, int], draw, window: int
) -> None:
    """Guards runs over processes: a step's records are the same ones, and every record comes once an epoch."""
    batch_size, batches, processes, num_steps = sizes
    a_step = batch_size * batches * processes
    extents = extents_of(draw, a_step * num_steps * window)
    divided = StepOrder(shuffle(len(extents)), batch_size, batches, processes, extents.__getitem__, window)
    whole = StepOrder(shuffle(len(extents)), a_step, 1, 1, extents.__getitem__, window)

    found = steps(iter(divided), a_step)

    assert [sorted(step) for step in found] == [sorted(step) for step in steps(iter(whole), a_step)]
    assert sorted(index for step in found for index in step) == list(range(len(extents)))
    plain = steps(iter(shuffle(len(extents))), a_step * window)
    for together, expected in zip(steps(iter(found), window), plain, strict=True):
        assert sorted(index for step in together for index in step) == sorted(expected)
        ranked = sorted(together, key=lambda step: sorted((extents[n] for n in step), reverse=True), reverse=True)
        for earlier, later in pairwise(ranked):
            assert min(extents[index] for index in earlier) >= max(extents[index] for index in later)


def padding(extents: list[tuple[bool, int]], batch_size: int, window: int) -> int:
    """Tokens that batches of a step of 64 are filled up with."""
    order = StepOrder(shuffle(len(extents)), batch_size, 64 // batch_size, 1, extents.__getitem__, window)
    batches = [[extents[index][1] for index in batch] for batch in BatchSampler(order, batch_size, drop_last=True)]
    return sum(len(batch) * max(batch) - sum(batch) for batch in batches)


def test_grouped_batches_of_digits_pad_a_third_of_what_shuffled_ones_do() -> None:
    """Guards what it is for; steps that keep their records save nearly as much as steps of like lengths."""
    digits = DigitsTask(split="train", seed=3, min_turns=1, max_turns=3)
    dataset = EncodedDataset(digits, 1280, Encoder(load_processor("pocket")))
    extents = [dataset.extent(index) for index in range(1280)]

    shuffled = [extents[index][1] for index in shuffle(1280)]
    batches = [shuffled[start : start + 16] for start in range(0, 1280, 16)]
    wasted = sum(len(batch) * max(batch) - sum(batch) for batch in batches)

    assert 2 * padding(extents, 16, 1) < wasted < padding(extents, 64, 1)
    assert 3 * padding(extents, 16, 4) < wasted


def test_extents_are_tokens_where_they_are_kept_and_characters_otherwise() -> None:
    """A picture counts for many words, and none is opened to tell."""
    encoder = Encoder(load_processor("pocket"))
    asked, told = Turn("How many digits are there?", "nine"), Turn("And the sum?", "thirty-one")
    short, long = Record("short", (asked,)), Record("long", (asked, told))
    seen = Record("seen", (Turn("<image>\nWhich?", "one"),), (Path("no such picture"),))
    kept = EncodedDataset([short, long], 2, encoder)
    streamed = EncodedDataset([short, long, seen], 3, _refuses, keep=False)  # type: ignore[arg-type]

    assert [kept.extent(index) for index in range(2)] == [(False, len(encoder(one).input_ids)) for one in (short, long)]
    assert [streamed.extent(n) for n in range(2)] == [(False, 30), (False, 30 + len("And the sum?thirty-one"))]
    assert streamed.extent(2) > (True, 1000)


def _refuses(record: Record) -> None:
    raise AssertionError(f"{record.id} was encoded only to tell its length")


@pytest.mark.parametrize("process", [0, 1])
def test_a_run_that_goes_on_in_several_processes_is_in_its_epoch(process: int) -> None:
    """Guards runs over epochs: behind skipped batches, loaders tell their epoch to a sampler that they were given."""
    order = StepOrder(shuffle(48), 2, 2, 2, lambda index: (True, index))
    loader = DataLoader(range(48), batch_size=2, sampler=order, drop_last=True)
    prepared = prepare_data_loader(loader, num_processes=2, process_index=process, use_seedable_sampler=True)
    prepared.set_sampler(order)
    prepared.set_epoch(1)
    whole = [batch.tolist() for batch in prepared]

    gone_on = skip_first_batches(prepared, 5)
    gone_on.set_epoch(1)

    assert [batch.tolist() for batch in gone_on] == whole[5:]
    prepared.set_epoch(0)
    assert [batch.tolist() for batch in prepared] != whole
