"""dataset/sampler.py: the order of an epoch, each process's share of it, and independent random streams."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from dataset.sampler import EpochSampler, Key, stream

# Labelled images, unlabelled ones and iterations per epoch of the published runs: 4 processes x 2.
PUBLISHED = {
    **{f"pascal {x}": (x, 10582 - x, n) for x, n in ((92, 1311), (183, 1300), (366, 1277), (732, 1231), (1464, 1140))},
    **{f"cityscapes {x}": (x, 2975 - x, n) for x, n in ((186, 349), (372, 325), (744, 279), (1488, 186))},
    **{
        f"coco {x}": (x, 118287 - x, n)
        for x, n in ((232, 14757), (463, 14728), (925, 14670), (1849, 14555), (3697, 14324))
    },
}


# UniMatch V2's supervised baseline: samples of an epoch, batch per process before it is doubled, iterations.
PUBLISHED_V2 = {
    "pascal": (3000, 4, 93),
    "cityscapes": (3000, 2, 187),
    "ade20k": (6000, 2, 375),
    "coco": (30000, 4, 937),
}


def _epoch(*args, epoch: int = 0, **kwargs) -> list[Key]:
    sampler = EpochSampler(*args, **kwargs)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(keys) == len(sampler)
    return keys


@pytest.mark.parametrize("partner", ["same_image", "other_image"])
def test_an_epoch_shows_each_unlabelled_image_exactly_once(partner):
    for epoch in range(3):
        keys = _epoch(5, 40, 4, 0, partner=partner, epoch=epoch)
        assert sorted(key.unlabeled for key in keys) == sorted(key.partner for key in keys) == list(range(40))
        assert {key.epoch for key in keys} == {epoch}


def test_the_labelled_set_is_repeated_to_the_unlabelled_ones_length():
    keys = _epoch(6, 40, 4, 0)
    assert sorted(key.labeled for key in keys) == list(range(40))
    # 40 = 6 * 6 + 4: each labelled image comes six or seven times.
    assert set(Counter(key.labeled % 6 for key in keys).values()) == {6, 7}


def test_a_longer_labelled_set_loses_no_image_for_good():
    epochs = [[key.labeled for key in _epoch(30, 10, 2, 0, epoch=epoch)] for epoch in range(30)]
    for labeled in epochs:
        assert len(set(labeled)) == 10
    assert {index for labeled in epochs for index in labeled} == set(range(30))


def test_a_supervised_epoch_is_one_pass_over_the_labelled_set():
    keys = _epoch(12, None, 4, 0)
    assert sorted(key.labeled for key in keys) == list(range(12))
    assert {(key.unlabeled, key.partner) for key in keys} == {(-1, -1)}


@pytest.mark.parametrize("labeled, length", [(3, 10), (10, 10), (12, 12)])
def test_a_supervised_epoch_repeats_a_short_labelled_set_up_to_a_length(labeled, length):
    keys = _epoch(labeled, None, 2, 0, repeat_labeled_to=10)
    assert sorted(key.labeled for key in keys) == list(range(length))  # each repetition is a sample of its own
    counts = Counter(key.labeled % labeled for key in keys).values()
    assert len(counts) == labeled and max(counts) - min(counts) <= 1
    shares = [_epoch(labeled, None, 1, 0, rank=rank, processes=2, repeat_labeled_to=10) for rank in range(2)]
    assert sorted(key for share in shares for key in share) == sorted(keys)


@pytest.mark.parametrize("name", [*PUBLISHED_V2])
def test_iterations_of_a_supervised_epoch_of_v2_are_the_published_ones(name):
    length, batch_size, iterations = PUBLISHED_V2[name]
    assert len(EpochSampler(92, None, 2 * batch_size, 0, processes=4, repeat_labeled_to=length)) == (
        2 * batch_size * iterations
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_iterations_per_epoch_are_the_published_ones(name):
    labeled, unlabeled, iterations = PUBLISHED[name]
    for rank in range(4):
        assert len(EpochSampler(labeled, unlabeled, 2, 0, rank, processes=4)) == 2 * iterations
    assert len(_epoch(labeled, unlabeled, 2, 0, rank=3, processes=4)) == 2 * iterations


@pytest.mark.parametrize("labeled, unlabeled, share", [(5, 13, 4), (50, 13, 4), (13, None, 4), (5, 10, 3)])
def test_shares_are_equal_and_only_the_last_images_are_repeated(labeled, unlabeled, share):
    keys = [_epoch(labeled, unlabeled, 1, 0, rank=rank, processes=4) for rank in range(4)]
    assert {len(own) for own in keys} == {share}
    counts = Counter(key.labeled if unlabeled is None else key.unlabeled for own in keys for key in own)
    images = unlabeled or labeled
    assert set(counts) == set(range(images)) and sum(counts.values()) == 4 * share
    assert max(counts.values()) == 2


@pytest.mark.parametrize("processes, batch_size", [(2, 2), (4, 1)])
@pytest.mark.parametrize("labeled, unlabeled", [(5, 42), (60, 42), (42, None)])
@pytest.mark.parametrize("partner", ["same_image", "other_image", "reversed_batch"])
def test_a_step_of_several_processes_sees_what_one_process_would(processes, batch_size, labeled, unlabeled, partner):
    one = _epoch(labeled, unlabeled, 4, 3, partner=partner, epoch=1)
    several = [
        _epoch(labeled, unlabeled, batch_size, 3, rank, processes, partner, epoch=1) for rank in range(processes)
    ]
    for step in range(len(one) // 4):
        together = [key for own in several for key in own[step * batch_size : (step + 1) * batch_size]]
        assert sorted(together) == sorted(one[4 * step : 4 * step + 4])


@pytest.mark.parametrize(("before", "after", "steps"), [((1, 8), (8, 1), 1231), ((8, 1), (2, 4), 1232)])
@pytest.mark.parametrize("partner", ["same_image", "reversed_batch"])
def test_with_the_steps_of_a_run_another_number_of_processes_sees_its_images_also_last(before, after, steps, partner):
    """Pascal's split 732: an epoch of one process has 1231 steps, one of eight 1232, whose last images are repeated."""

    def last_steps(processes: int, size: int, steps: int | None) -> list[list[int]]:
        shares = []
        for rank in range(processes):
            sampler = EpochSampler(732, 9850, size, 0, rank, processes, partner, steps=steps)
            sampler.set_epoch(1, start=size * 1200)
            shares.append(np.array([key.unlabeled for key in sampler]).reshape(-1, size))
        return np.sort(np.concatenate(shares, axis=1)).tolist()

    expected = last_steps(*before, None)
    assert len(expected) == steps - 1200 and last_steps(*after, steps) == expected
    assert len(last_steps(*after, None)) != len(expected)


@pytest.mark.parametrize("processes, batch_size", [(2, 2), (2, 4), (4, 2), (3, 4)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_process_finds_in_its_reversed_batch_what_one_process_would(processes, batch_size, accumulate):
    """CutMix's partners; also from the middle of an epoch."""

    def pairs(rank: int, count: int, size: int) -> list[tuple[int, int]]:
        sampler = EpochSampler(5, 96, size, 3, rank, count, "reversed_batch", accumulate=accumulate)
        sampler.set_epoch(1, start=size * accumulate)
        batches = np.array([key.unlabeled for key in sampler]).reshape(-1, size)
        return np.stack([batches, batches[:, ::-1]], axis=-1).reshape(-1, 2).tolist()

    one, total = pairs(0, 1, batch_size * processes), batch_size * processes
    several = [pairs(rank, processes, batch_size) for rank in range(processes)]
    assert len(one) == processes * len(several[0]) > total
    for start in range(0, len(several[0]), batch_size):
        together = [pair for own in several for pair in own[start : start + batch_size]]
        assert sorted(together) == sorted(one[start * processes : start * processes + total])


@pytest.mark.parametrize("unlabeled", [40, None])
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(unlabeled):
    first = _epoch(40, unlabeled, 4, seed=1, epoch=2)
    torch.manual_seed(99)
    np.random.seed(99)
    assert _epoch(40, unlabeled, 4, seed=1, epoch=2) == first
    for other in (_epoch(40, unlabeled, 4, seed=2, epoch=2), _epoch(40, unlabeled, 4, seed=1, epoch=3)):
        assert [key.labeled for key in other] != [key.labeled for key in first]
        assert unlabeled is None or [key.unlabeled for key in other] != [key.unlabeled for key in first]
    if unlabeled:
        assert [key.labeled for key in first] != [key.unlabeled for key in first]  # two orders, not one


@pytest.mark.parametrize("partner", ["same_image", "other_image", "reversed_batch"])
@pytest.mark.parametrize("labeled, unlabeled, processes", [(5, 40, 1), (60, 41, 3), (5, 7, 4), (13, None, 2)])
def test_the_order_is_that_of_whole_padded_permutations(labeled, unlabeled, processes, partner):
    """Runs that were begun by earlier versions go on in the same order, also from the middle of an epoch."""
    length = unlabeled or labeled
    x = stream(7, 0, 2).permutation(max(labeled, length))[:length]
    u = stream(7, 1, 2).permutation(length) if unlabeled else np.full(length, -1)
    mix = {"same_image": u, "other_image": np.roll(u, -1), "reversed_batch": np.full(length, -1)}[partner]
    for rank in range(processes):
        sampler = EpochSampler(labeled, unlabeled, 1, 7, rank, processes, partner)
        padded = [np.resize(order, -(-length // processes) * processes)[rank::processes] for order in (x, u, mix)]
        expected = [Key(2, *map(int, values)) for values in zip(*padded, strict=True)]
        for start in (0, 1):
            sampler.set_epoch(2, start)
            assert list(sampler) == expected[start:]


def test_a_sampler_can_be_walked_through_twice():
    sampler = EpochSampler(5, 20, 4, 0)
    assert list(sampler) == list(sampler)


def test_same_image_is_its_own_partner_and_other_image_never():
    assert all(key.partner == key.unlabeled for key in _epoch(5, 40, 4, 0))
    for epoch in range(20):
        for rank in range(3):
            keys = _epoch(2, 5, 1, 0, rank=rank, processes=3, partner="other_image", epoch=epoch)
            assert len(keys) == 2 and all(key.partner != key.unlabeled for key in keys)


def test_another_images_partner_is_the_next_of_the_epochs_order():
    keys = _epoch(2, 5, 1, 0, partner="other_image")
    assert [key.partner for key in keys] == [key.unlabeled for key in [*keys[1:], keys[0]]]


def test_an_epoch_that_is_continued_has_the_keys_that_were_left():
    whole = _epoch(2, 7, 2, 0, epoch=1)
    sampler = EpochSampler(2, 7, 2, 0)
    sampler.set_epoch(1, start=4)
    assert list(sampler) == whole[4:] and len(whole) == 6


def test_streams_of_different_purposes_differ():
    draws = {tuple(stream(*seed).integers(1 << 30, size=2)) for seed in np.ndindex(3, 3, 3)}
    assert len(draws) == 27
    assert stream(1, 2, 3).random() == stream(1, 2, 3).random()
