"""How far long work is, on stderr: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from . import render

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..retrieval.progress import OnProgress

T = TypeVar("T", bound="Stages")

SECONDS_A_LINE = 10.0


@contextmanager
def encoding_progress() -> Iterator[OnProgress]:
    """Give a callback that draws a bar in a terminal, and prints a line now and then elsewhere."""
    if sys.stderr.isatty():
        with _bar() as update:
            yield update
    else:
        yield _Lines()


@contextmanager
def _bar() -> Iterator[OnProgress]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[numbers]}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
    )
    console = Console(stderr=True, highlight=False)
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Looking for photographs, loading the model", total=None, numbers="")
        rate = Rate()

        def update(done: int, total: int) -> None:
            numbers = f"{done:,} of {total:,}  {rate(done):.1f} images/s"
            bar.update(task, description="Encoding", completed=done, total=total, numbers=numbers)

        yield update


class Rate:
    """Files a second since the first call: the loading of the model does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Take a clock that counts seconds."""
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int) -> float:
        """Return the rate, now that so many are done."""
        now = self._clock()
        if self._first is None:
            self._first = (done, now)
        count, start = self._first
        return (done - count) / (now - start) if now > start else 0.0


class Stages:
    """Shows pieces of work that come one after the other.

    `with Stages() as stages: work(prepare=stages.prepare)`
    """

    def __init__(self) -> None:
        """Show nothing yet."""
        self.bar: Progress | None = None
        self._next_line = 0.0

    def __enter__(self: T) -> T:
        """Open the bar, in a terminal."""
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=20),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[numbers]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True, highlight=False),
            )
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.stop()

    def prepare(self, what: str) -> OnProgress:
        """Announce a piece of work, such as "Encoding images"; return its progress callback."""
        rate = Rate()
        unit = what.split()[-1]
        task: TaskID | None = None

        def update(done: int, total: int) -> None:
            nonlocal task
            speed = rate(done)
            numbers = f"{speed:.1f} {unit}/s" if speed else ""
            if self.bar is not None:
                if task is None:
                    task = self.bar.add_task(what, total=total, numbers="")
                self.bar.update(task, completed=done, numbers=numbers)
            elif speed and self.due(done == total):
                render.say(f"{what}: {done:,} of {total:,}, {numbers}")

        return update

    def due(self, last: bool) -> bool:
        """Tell whether it is time for another line, outside of a terminal."""
        now = time.monotonic()
        if now < self._next_line and not last:
            return False
        self._next_line = now + SECONDS_A_LINE
        return True


class _Lines:
    def __init__(self) -> None:
        self._rate = Rate()
        self._next = time.monotonic() + SECONDS_A_LINE

    def __call__(self, done: int, total: int) -> None:
        rate = self._rate(done)
        if time.monotonic() < self._next or not rate:
            return
        self._next = time.monotonic() + SECONDS_A_LINE
        left = render.duration((total - done) / rate)
        render.say(f"{done:,} of {render.images(total)}, {rate:.1f} images/s, {left} left")
