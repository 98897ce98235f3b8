"""How far a training run is, on stderr: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import render
from .progress import Rate

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from .progress import OnProgress

SECONDS_A_LINE = 10.0
SHOWN_SKIPPED = 10


class TrainingProgress:
    """Draws what the trainer tells."""

    def __init__(self) -> None:
        """Draw nothing yet."""
        self.skipped: set[str] = set()  # reasons, each with the name of the image
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._next_line = 0.0

    def __enter__(self) -> TrainingProgress:
        """Open the bar, in a terminal."""
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=20),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[numbers]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True, highlight=False),
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()

    def prepare(self, what: str) -> OnProgress:
        """Announce a piece of preparation; return its progress callback."""
        rate = Rate()
        task: TaskID | None = None

        def update(done: int, total: int) -> None:
            nonlocal task
            numbers = f"{rate(done):.1f} images/s"
            if self._bar is not None:
                if task is None:
                    task = self._bar.add_task(what, total=total, numbers="")
                self._bar.update(task, completed=done, numbers=numbers)
            elif self._due(done == total):
                render.say(f"{what}: {done:,} of {total:,}, {numbers}")

        return update

    def observe(self, event: Mapping[str, Any]) -> None:
        """Take an update's or a validation's numbers, or images that were skipped."""
        if "skipped" in event:
            for reason in event["skipped"]:
                if reason not in self.skipped and len(self.skipped) < SHOWN_SKIPPED:
                    self._say(f"skipped {reason}")
                self.skipped.add(reason)
        elif "validation" in event:
            numbers = "  ".join(f"{n} {v:.1f}" for n, v in event["validation"].items() if "@" in n)
            self._say(f"update {event['step']}, validation: {numbers}")
        elif "itm_scale" in event:
            self._say(f"the ITM head is scaled by {event['itm_scale']:g}, chosen in validation")
        else:
            self._draw(event)

    def _draw(self, event: Mapping[str, Any]) -> None:
        losses = "  ".join(
            f"{n.upper()} {event[n]:.3f}" for n in ("itc", "itm", "itg") if n in event
        )
        numbers = (
            f"{losses}  T {event['temperature']:.4f}  lr {event['lr']:.1e}  "
            f"{event['pairs_per_second']:.1f} pairs/s"
        )
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("Training", total=event["steps"], numbers="")
            self._bar.update(self._task, completed=event["step"], numbers=numbers)
        elif self._due(event["step"] == event["steps"]):
            render.say(f"update {event['step']:,} of {event['steps']:,}: {numbers}")

    def _due(self, last: bool) -> bool:
        now = time.monotonic()
        if now < self._next_line and not last:
            return False
        self._next_line = now + SECONDS_A_LINE
        return True

    def _say(self, message: str) -> None:
        if self._bar is not None:
            self._bar.console.print(render.printable(message), markup=False, style="dim")
        else:
            render.say(message)
