"""What `calibrate` reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ..comparison.before_after import BeforeAfter
from ..display.overview import ReportInNotebook
from ..display.progress import shown
from .fit import Fit


@dataclass(frozen=True)
class LayerResult:
    """One calibrated norm.

    error_before, error_after: distance between the moments of its output and the original's, relative to the
    original's standard deviation over all channels (see `norm_targets.distance`); before: on inputs that are already
    repaired. calls: how often it ran per batch at most.
    """

    path: str
    norm: str
    channels: int
    calls: int
    error_before: float
    error_after: float
    dead: int = 0


Tell = Callable[[int, int], None]


@contextmanager
def teller(progress: Tell | bool | None, what: str) -> Iterator[Tell | None]:
    """What is told how far a work is: the caller's function, or a line of its own; None where nobody is."""
    with shown(progress if isinstance(progress, bool) else None if progress is None else False, what) as line:
        yield progress if callable(progress) else line


@contextmanager
def told(progress: Tell | bool | None, total: int, what: str = "calibrating") -> Iterator[Callable[[], None]]:
    """What to call at each step, of about `total`."""
    with teller(progress, what) as tell:
        done = 0

        def step() -> None:
            nonlocal done
            done = min(done + 1, total)  # norms that run several times are repaired several times
            if tell is not None:
                tell(done, total)

        yield step


@dataclass(frozen=True)
class CalibrationReport(BeforeAfter, ReportInNotebook):
    """The result of `calibrate`.

    images: how many were used, of which `compared` for the figures of `BeforeAfter`. passes: how often the converted
    network ran over the images. bad: images that could not be read and were left out.
    distance: of the statistics that the images cause from those that the original remembers of its training, see
    `Fit`; None where it remembers none. stand_ins: what was taken in the place of images.
    """

    images: int
    layers: tuple[LayerResult, ...] = field(repr=False)
    passes: int = 1
    notes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    distance: float | None = None
    stand_ins: str = ""

    @property
    def fitted(self) -> bool:
        """See `BeforeAfter`."""
        return True

    @property
    def fit(self) -> str:
        """One sentence on whether the images were of the kind the network was trained on; empty where unknown."""
        if self.stand_ins or self.distance is None:
            return self.stand_ins
        found = Fit(self.distance, self.images)
        return f"the images: {found}" + ("; to train on such, start from the network as converted" if found.far else "")

    @property
    def error_before(self) -> float:
        """The largest moment error of any layer before its repair."""
        return max((layer.error_before for layer in self.layers), default=0.0)

    @property
    def error_after(self) -> float:
        """The largest moment error of any layer after it."""
        return max((layer.error_after for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "layers": [asdict(layer) for layer in self.layers],
            "notes": list(self.notes),
            "bad": list(self.bad),
        }

    def __str__(self) -> str:
        if not self.layers:
            return "nothing to calibrate" + "".join(f"; {note}" for note in self.notes)
        count = len(self.layers)
        lines = [
            f"calibrated {count} layer{'s' * (count != 1)} on {self.images} image{'s' * (self.images != 1)}",
            f"moment error, largest of any layer: {self.error_before:.3g} -> {self.error_after:.3g}",
        ]
        return "\n".join([*lines, *self.lines(), *filter(None, [self.fit]), *self.notes])
