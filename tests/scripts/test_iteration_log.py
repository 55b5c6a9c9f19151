"""What is read off notes of iterations."""

import numpy as np
import pytest

from studies.iteration_log import COLUMNS, dispatch_times, heard_late_s, lone_prompt_s


def row(end_s: float, *, took_s=0.001, waited_s=0.002, batch=1, prompt=0, turned_s=None):
    """One iteration, whose tokens are sent at `end_s`."""
    began_s = end_s - 0.005 if turned_s is None else turned_s
    values = dict.fromkeys(COLUMNS, 0.0) | {
        "turn_s": began_s,
        "dispatched_s": began_s + took_s,
        "collect_s": end_s - waited_s,
        "collected_s": end_s,
        "sunk_s": end_s,
        "batch": batch,
        "prefills": float(prompt > 0),
        "prefill_tokens": prompt,
    }
    return [values[name] for name in COLUMNS]


def test_steps_are_heard_of_now_sooner_now_later():
    ends_s = np.cumsum(np.tile([0.004, 0.005, 0.006], 40))
    rows = np.array([row(end_s) for end_s in ends_s])
    late_s = heard_late_s(rows)
    assert len(late_s) == 101
    assert [late_s[0], late_s[50], late_s[100]] == pytest.approx([-0.001, 0.0, 0.001])
    # A step that the host came late to says nothing of it, nor a prompt, nor other batches.
    for odd in (row(9.0, waited_s=0.0), row(9.0, prompt=8), row(9.0, batch=2)):
        assert heard_late_s(np.concatenate([rows, [odd]])) == late_s
    assert heard_late_s(rows[:1]) == []


def test_dispatch_times_are_told_apart_by_kind():
    rows = np.array(
        [
            row(1.0, took_s=0.004, batch=0, prompt=8),
            row(1.1, took_s=0.003),
            row(1.2, took_s=0.001),
            row(1.3, took_s=0.001),
            row(1.4, took_s=0.003, batch=2),
            row(1.5, took_s=0.009, batch=2, prompt=8),
        ]
    )
    times = dispatch_times(rows)
    assert times is not None
    for seconds, value in ((times.alike, 0.001), (times.changed, 0.003), (times.piece, 0.004)):
        assert seconds == pytest.approx([value] * len(seconds))
    assert dispatch_times(rows[1:]) is None


def test_a_lone_prompt_is_taken_from_its_first_piece_to_its_last():
    rows = np.array(
        [
            row(1.0, batch=0, prompt=64, turned_s=0.9),
            row(1.2, batch=0, prompt=36, turned_s=1.0),
            row(1.3),
            row(2.0, batch=0, prompt=100, turned_s=1.8),
            row(2.3, batch=3, prompt=100, turned_s=1.0),
        ]
    )
    assert lone_prompt_s(rows, 100) == pytest.approx((0.3 + 0.2) / 2)
    assert lone_prompt_s(rows, 101) is None
