"""util/train/progress.py: epochs and steps done, the best epoch, and what a checkpoint holds of them."""

from __future__ import annotations

import math

from util.train.progress import Progress


def test_iterations_count_over_epochs():
    assert Progress(steps=10).iteration == 0
    assert Progress(steps=10, epoch=3, position=4).iteration == 34


def test_the_first_epoch_is_the_best_until_a_later_one_is_better():
    progress = Progress(steps=2, position=2)
    assert progress.finish_epoch(50.0)
    assert (progress.epoch, progress.position) == (1, 0)
    assert not progress.finish_epoch(50.0)  # as good is not better: the earlier one stays
    assert progress.finish_epoch(60.0)
    assert not progress.finish_epoch(40.0)
    assert (progress.previous_best, progress.best_epoch, progress.last_miou) == (60.0, 3, 40.0)


def test_an_epoch_of_zero_miou_is_better_than_none():
    assert Progress(steps=2).finish_epoch(0.0)


def test_an_epoch_without_evaluation_changes_no_miou():
    progress = Progress(steps=2)
    progress.finish_epoch(50.0)
    assert not progress.finish_epoch(None)
    assert (progress.epoch, progress.previous_best, progress.best_epoch, progress.last_miou) == (2, 50.0, 1, 50.0)


def test_a_saved_place_is_taken_up_and_counted_in_todays_epochs():
    saved = Progress(steps=10, epoch=3, position=4, previous_best=70.0, best_epoch=2, last_miou=60.0)
    progress = Progress(steps=20)
    progress.load_state_dict(saved.state_dict())
    assert progress == Progress(20, 3, 4, 70.0, 2, 60.0) and progress.iteration == 64


def test_only_a_state_from_within_an_epoch_has_a_position():
    assert "position" not in Progress(steps=10, epoch=3).state_dict()
    assert Progress(steps=10, epoch=3, position=1).state_dict()["position"] == 1


def test_a_state_without_some_keys_leaves_them_alone():
    progress = Progress(steps=10)
    progress.load_state_dict({"epoch": 2})
    assert progress.epoch == 2 and progress.previous_best == -math.inf and math.isnan(progress.last_miou)
