"""What sets an operation off: the loss, its standing still, the longest wait, and their order."""

import dataclasses
import json
import math

import pytest
from schedule_entries import entries, entry

from jaxmorph.growth.triggers import LossTrend, due

# threshold, wait, steps since the last operation, loss, what is due
DUE = [
    (3.0, 100, 5, 2.9, "loss"),
    (3.0, 100, 5, 3.0, None),
    (3.0, 100, 5, None, None),
    (3.0, 100, 99, 3.1, None),
    (3.0, 100, 100, 3.1, "timeout"),
    (3.0, 100, 100, None, "timeout"),
    (3.0, 100, 101, None, "timeout"),
    (3.0, 100, 100, 2.0, "loss"),
    (3.0, None, 10**6, 3.1, None),
    (None, 100, 5, 0.1, None),
    (None, 100, 100, 0.1, "timeout"),
    (3.0, None, 5, math.nan, None),
    (3.0, None, 5, -math.inf, None),
    (3.0, None, 5, math.inf, None),
    (3.0, 5, 5, math.nan, "timeout"),
]


@pytest.mark.parametrize(("threshold", "wait", "since", "loss", "reason"), DUE)
def test_entry_is_due_as_the_contract_says(threshold, wait, since, loss, reason):
    (one,) = entries(entry(trigger_loss=threshold, max_wait_iters=wait))
    for last in (0, 1234):
        assert due(one, last + since, last, loss, LossTrend(1.0, 999)) == reason


# threshold, evaluations to wait for, longest wait, what is due; the loss is 2.5 at step 50, and 3
# evaluations have not improved it
STANDING = [
    (None, 3, None, "plateau"),
    (None, 2, None, "plateau"),
    (None, 4, None, None),
    (3.0, 3, 50, "loss"),
    (2.0, 3, 50, "plateau"),
    (2.0, 4, 50, "timeout"),
    (2.0, 4, 51, None),
]


@pytest.mark.parametrize(("threshold", "patience", "wait", "reason"), STANDING)
def test_reasons_come_in_the_order_loss_plateau_timeout(threshold, patience, wait, reason):
    row = entry(trigger_loss=threshold, trigger_plateau=patience, max_wait_iters=wait)
    (one,) = entries(row)
    assert due(one, 50, 0, 2.5, LossTrend(2.4, 3)) == reason


# losses of evaluations, the part that counts as an improvement, best and evaluations after them
TRENDS = {
    "nothing": ([], 0.1, (None, 0)),
    "the first improves": ([5.0], 0.1, (5.0, 0)),
    "the first is not finite": ([math.nan], 0.1, (None, 1)),
    "none is finite": ([math.nan, math.inf, -math.inf, None], 0.1, (None, 4)),
    "finite after those": ([math.nan, 7.0], 0.1, (7.0, 0)),
    "falls enough": ([5.0, 4.4], 0.1, (4.4, 0)),
    "falls by just the part": ([4.0, 3.0], 0.25, (4.0, 1)),
    "too little does not move the best": ([5.0, 4.6, 4.55], 0.1, (5.0, 2)),
    "little by little is enough in the end": ([5.0, 4.6, 4.4], 0.1, (4.4, 0)),
    "rises": ([5.0, 6.0, 5.5], 0.1, (5.0, 2)),
    "minus infinity is no improvement": ([5.0, -math.inf], 0.1, (5.0, 1)),
    "any fall, if 0": ([5.0, 4.999999], 0.0, (4.999999, 0)),
    "the same is none, if 0": ([5.0, 5.0], 0.0, (5.0, 1)),
}


@pytest.mark.parametrize("name", TRENDS)
def test_trend_counts_evaluations_without_improvement(name):
    losses, min_change, expected = TRENDS[name]
    trend = LossTrend()
    for loss in losses:
        trend = trend.after(loss, min_change)
    assert (trend.best, trend.evaluations) == expected
    assert LossTrend(**json.loads(json.dumps(dataclasses.asdict(trend)))) == trend


def test_an_operation_begins_a_trend_with_the_loss_evaluated_again_if_it_is_finite():
    assert LossTrend.since_operation() == LossTrend(None, 0)
    assert LossTrend.since_operation(4.0) == LossTrend(4.0, 0)
    for loss in (math.nan, math.inf, -math.inf, None):
        assert LossTrend.since_operation(loss) == LossTrend(None, 0)
