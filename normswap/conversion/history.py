"""What was done to a network since its conversion, one entry each, as the manifest of its file tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Entry:
    """One thing that was done. `to_dict` gives back what `from_dict` was given, whatever version wrote it."""

    action: ClassVar[str] = ""
    trains: ClassVar[bool] = True

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with an "action"."""
        read: dict[str, Any] | None = self.__dict__.get("_read")
        return {"action": self.action, **asdict(self)} if read is None else dict(read)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entry:
        """The inverse of `to_dict`; `Other` for an action that is not known."""
        kind = next((kind for kind in (Calibrated, Distilled, FineTuned) if kind.action == values.get("action")), None)
        if kind is None:
            return Other(dict(values))
        known = {each.name for each in fields(kind)}
        entry = kind(**{name: value for name, value in values.items() if name in known})
        object.__setattr__(entry, "_read", dict(values))  # with what this version does not know or would add
        return entry


@dataclass(frozen=True)
class Calibrated(Entry):
    """`calibrate`: images used, norms repaired, how many of them balanced, their new eps, drift before and after.

    stand_ins: what stood in for images, empty where there were some.
    """

    action: ClassVar[str] = "calibrate"
    trains: ClassVar[bool] = False

    images: int = 0
    layers: int = 0
    method: str = "moments"
    balanced: int = 0
    eps: float | None = None
    drift: list[float | None] = field(default_factory=list)
    stand_ins: str = ""

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return values if self.stand_ins else {name: value for name, value in values.items() if name != "stand_ins"}


@dataclass(frozen=True)
class Distilled(Entry):
    """`distil`: steps made, of so many planned, and the step that was kept; the loss at first and at last."""

    action: ClassVar[str] = "distil"

    steps: int = 0
    planned: int = 0
    kept: int = 0
    train: str = "all"
    lr: float = 0.0
    seed: int = 0
    loss: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class FineTuned(Entry):
    """`finetune`: steps made, of so many planned, and the last figures."""

    action: ClassVar[str] = "finetune"

    steps: int = 0
    planned: int = 0
    train: str = "all"
    lr: float = 0.0
    optimizer: str = ""
    global_batch: int = 0
    seed: int = 0
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Other(Entry):
    """What another version has done; kept as it was read."""

    values: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)

    @property
    def trains(self) -> bool:  # type: ignore[override]
        return self.values.get("action") is not None
