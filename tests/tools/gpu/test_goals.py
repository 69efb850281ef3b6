"""Goals, of rows with times that are known."""

from __future__ import annotations

import pytest

from titans_build.tools.gpu.goals import exponent, goals, shares

DEEP = dict(what="memory", direction="both", d=128, layers=2, tiles=None, schedule="auto", chunk=64)
RATES = [dict(what="matrix product", dtype="bfloat16", rate=1000.0), dict(what="copy", seconds=1.0, rate=100.0)]


def reached(rows, of):
    shares(rows)
    (found,) = [goal for goal in goals(rows) if goal.what.startswith(of)]
    return found.reached, found.met


def test_without_measurements_no_goal_is_met_or_missed():
    found = goals([dict(what="memory", failed="out of memory")])
    assert len(found) == 6 and all(goal.reached == "not measured" and goal.met is None for goal in found)


def test_shares_are_of_the_rates_that_were_measured_in_the_same_run():
    rows = [*RATES, dict(DEEP, seconds=2.0, flops=520.0), dict(DEEP, seconds=1.0, flops=600.0)]
    assert reached(rows, "memory, heads of 128, chunk 64") == ("26% to 60%", True)
    assert reached([*rows, dict(DEEP, seconds=1.0, flops=100.0)], "memory, heads of 128, chunk 64") == (
        "10% to 60%",
        False,
    )
    assert reached([*rows, dict(DEEP, chunk=512, seconds=1.0, flops=410.0)], "memory, heads of 128, chunk 512")[1]


def test_goals_against_others_compare_equal_shapes():
    flat = dict(DEEP, layers=1, rows=128, length=2048, seconds=3.0)
    rule = dict(what="gated delta rule", direction="both", rows=128, length=2048, d=128, seconds=2.0)
    assert reached([flat, rule, dict(flat, rows=16, seconds=9.0)], "memory of one layer") == ("1.50", False)
    step = dict(what="training step", length=32768, compiled=False, graphs=False)
    rows = [dict(step, model="mag-170m", seconds=2.0), dict(step, model="transformer-170m", seconds=3.0)]
    assert reached(rows, "MAG at 32,768") == ("1.50", True) and reached(rows, "MAG at 131,072")[1] is None


def test_the_goal_of_a_decoding_step_is_reading_its_state_once():
    assert reached([*RATES, dict(what="memory step", seconds=2.0, state=100.0)], "step of a token") == ("2.00", False)


def test_the_exponent_of_a_square_is_two():
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert exponent([1], [3.0]) is None
