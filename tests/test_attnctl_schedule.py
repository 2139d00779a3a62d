"""Step windows by fraction, index and noise level."""

from __future__ import annotations

import pytest

from attnctl.errors import HostError, OptionError
from attnctl.records import Step
from attnctl.schedule import Schedule, Window

SIGMAS = [14.6, 7.0, 3.0, 1.0, 0.2]


def active(schedule: Schedule, count: int = 5) -> list[int]:
    steps = [Step(i, count, None, lambda i=i: SIGMAS[i]) for i in range(count)]
    return [s.index for s in steps if s in schedule]


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ((0.0, 1.0), [0, 1, 2, 3, 4]),
        ("0-0.4", [0, 1]),
        ("0.2-0.8", [1, 2, 3]),
        ("steps:1-3", [1, 2]),
        ("sigmas:7-1", [1, 2]),
        ("sigmas:14.6-0", [0, 1, 2, 3, 4]),
        ("0-0.2 0.8-1", [0, 4]),
        ([(0.0, 0.2), "steps:3-4"], [0, 3]),
        (Window(0.2, 0.4), [1]),
        ("0.5-0.5", []),
    ],
)
def test_windows(value: object, want: list[int]) -> None:
    assert active(Schedule.of(value)) == want


def test_a_schedule_survives_its_own_text() -> None:
    for text in ("0-0.4", "steps:1-3", "sigmas:7-1", "0-0.2 0.8-1"):
        assert str(Schedule.of(text)) == text


@pytest.mark.parametrize("value", ["0.5", "a-b", "0.8-0.2", "0-1.5", "sigmas:1-7", 3, None])
def test_bad_windows_say_so(value: object) -> None:
    with pytest.raises(OptionError):
        Schedule.of(value)


def test_fractions_need_a_known_number_of_steps() -> None:
    with pytest.raises(HostError, match="steps=N"):
        _ = Step(1, 0) in Schedule.of("0-0.5")
    assert Step(1, 0) in Schedule()


def test_sigmas_need_a_scheduler() -> None:
    with pytest.raises(HostError, match="scheduler"):
        _ = Step(1, 4) in Schedule.of("sigmas:7-1")
