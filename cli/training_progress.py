"""How far a training run is, on stderr: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import render
from .progress import Stages

if TYPE_CHECKING:
    from rich.progress import TaskID

SHOWN_SKIPPED = 10


class TrainingProgress(Stages):
    """Draws what the trainer tells, and the pieces of work before it."""

    def __init__(self) -> None:
        """Draw nothing yet."""
        super().__init__()
        self.skipped: set[str] = set()  # reasons, each with the name of the image
        self._task: TaskID | None = None

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
        if self.bar is not None:
            if self._task is None:
                self._task = self.bar.add_task("Training", total=event["steps"], numbers="")
            self.bar.update(self._task, completed=event["step"], numbers=numbers)
        elif self.due(event["step"] == event["steps"]):
            render.say(f"update {event['step']:,} of {event['steps']:,}: {numbers}")

    def _say(self, message: str) -> None:
        if self.bar is not None:
            self.bar.console.print(render.printable(message), markup=False, style="dim")
        else:
            render.say(message)
