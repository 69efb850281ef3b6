"""Goals and trends, of rows with times that are known."""

from __future__ import annotations

import math

import pytest

from titans_build.tools.gpu.goals import exponent, goals, trends
from titans_build.tools.gpu.timing import Measurement


def row(what, backend, shape, seconds, direction="both", share=0.0, tokens=1, peak=0, failed=""):
    times = (seconds, seconds, seconds)
    return Measurement(what, backend, shape, direction, *times, 1.0, 0.0, share, tokens, peak, failed)


def memory(length, seconds, **facts):
    shape = f"128 x {length}, d 64, expansion 2"
    return row("memory", "triton", shape, seconds, tokens=128 * length, **facts)


def reached(rows, of):
    (found,) = [goal for goal in goals(rows) if goal.what.startswith(of)]
    return found.reached, found.met


def test_a_trend_spans_the_lengths_of_one_case():
    rows = [memory(n, 3e-6 * n**1.5, peak=n * 128 * 10) for n in (8192, 2048, 32768)]
    rows += [memory(2048, 1.0, direction="forward"), memory(65536, math.nan, failed="out of memory")]
    (trend,) = trends(rows)
    assert trend.lengths == (2048, 8192, 32768) and trend.shape == "128 x time, d 64, expansion 2"
    assert trend.exponent == pytest.approx(1.5) and trend.bytes == (10, 10, 10)


def test_without_measurements_no_goal_is_met_or_missed():
    found = goals([])
    assert len(found) == 10 and all(goal.reached == "not measured" and goal.met is None for goal in found)


def test_the_goals_for_shares_of_the_matrix_rate():
    rows = [memory(2048, 1, share=0.41), memory(8192, 1, share=0.5), memory(8192, 1, share=0.1, direction="forward")]
    assert reached(rows, "memory, d 64, expansion 2") == ("41% to 50%", True)
    assert reached([*rows, memory(32768, 1, share=0.39)], "memory, d 64, expansion 2") == ("39% to 50%", False)


def test_the_goals_against_other_libraries():
    shape = "128 x 2048, d 64, expansion 2"
    rows = [row("memory block", "titans-pytorch", shape, 60.0), row("memory block", "auto", shape, 1.0)]
    assert reached(rows, "memory block") == ("60.0", True)
    assert reached([rows[0]._replace(failed="no such package"), rows[1]], "memory block") == ("not measured", None)
    shape = "128 x 2048, d 128, one layer"
    rows = [row("memory", "triton", shape, 3.0), row("memory", "fla gated delta rule", shape, 2.0)]
    assert reached(rows, "memory of one layer") == ("1.50", False)


def test_the_goals_for_models_by_length():
    rows = [
        row(f"model {name}", backend, f"1 x {length}", seconds, tokens=length)
        for length, ours, theirs in ((32768, 1.0, 1.6), (131072, 4.0, 12.0))
        for name, backend, seconds in (("mag", "auto", ours), ("transformer", "SDPA", theirs))
    ]
    assert reached(rows, "MAG at 32,768 tokens") == ("1.60", True)
    assert reached(rows, "MAG past 100,000 tokens") == ("3.00", False)


def test_the_goals_of_a_decoding_step():
    """Reading is half of what is moved: a step that moves all of it at full speed takes twice as long."""
    step = row("memory step", "triton_step", "2048 x 1, d 64, expansion 2", 1.0, share=0.8)
    assert reached([step], "step of a token: its time over that of reading") == ("2.50", False)
    assert reached([step], "step of a token: its time over that of moving") == ("1.25", True)


def test_the_exponent_of_a_square_is_two():
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert exponent([1], [3.0]) is None
