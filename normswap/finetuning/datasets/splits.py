"""A training and a validation set, whatever is learnt from them: how they are found in a folder, or split."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.image_files import identity
from ...errors import DataError, listed

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "test", "testing", "eval", "dev")
SHARE = 0.1
"""The part of a data set without a validation set that becomes one."""


@dataclass(frozen=True)
class Sets:
    """Two map-style data sets; `validation` may be None. classes: their names. note: what was decided for the user."""

    train: Any
    validation: Any
    classes: tuple[str, ...] | None = None
    note: str = ""

    @property
    def digest(self) -> str:
        """Tells other data: of names, numbers and labels, not of the pictures themselves."""
        what = []
        for data in (self.train, self.validation):
            names = getattr(data, "files", None)
            listed = None if names is None else [os.path.relpath(f, data.folder) for f in names]
            what.append([None if data is None else len(data), listed, getattr(data, "labels", None)])
        return hashlib.sha256(repr((self.classes, what)).encode()).hexdigest()[:16]

    @property
    def count(self) -> int | None:
        """How many classes there are, None where the data does not say."""
        return None if self.classes is None else len(self.classes)


def split(
    count: int, seed: int, labels: Sequence[int] | None = None, files: Sequence[Path] = ()
) -> tuple[list[int], list[int]]:
    """Indices of a training and a validation part, always the same by `seed`.

    With labels, of every class that has two samples or more both parts have one. files: of the samples; a file that is
    there several times, by links, is trained on.
    """
    by_class: dict[int, list[int]] = {}
    for i in range(count):
        by_class.setdefault(0 if labels is None else labels[i], []).append(i)
    held: set[int] = set()
    for label, members in sorted(by_class.items()):
        random.Random(f"{seed} {label}").shuffle(members)
        held.update(members[: max(1, round(SHARE * len(members))) if len(members) > 1 else 0])
    if files:
        same = [identity(file) for file in files]
        times = Counter(same)
        held -= {i for i in held if times[same[i]] > 1}
    return [i for i in range(count) if i not in held], sorted(held)


def check_apart(train: Sequence[Path], validation: Sequence[Path]) -> None:
    """Raise DataError where a file is in both sets, by whatever path: what is trained on proves nothing."""
    trained = {identity(file) for file in train}
    both = [str(file) for file in validation if identity(file) in trained]
    if both:
        raise DataError(
            listed(f"{len(both)} of the {len(validation)} validation images are training images too:", both),
            hint="Take them out of one of the two, or leave the validation images out: a tenth is then held back.",
        )


def held_note(held: int, count: int, seed: int) -> str:
    """What is said of such a split."""
    return f"no validation images: {held} of the {count} images are held back for it (seed {seed})"


def part_of(folder: Path, names: Sequence[str]) -> Path | None:
    """The subfolder with the first of these names that is there."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def held_out(sets: Sets) -> Sets:
    """The validation set as both parts, to measure on; its classes are numbered as those of training are."""
    place = getattr(sets.validation, "folder", None)
    note = "" if place is None else f"measured on {place}, not on the training images beside it"
    return Sets(sets.validation, sets.validation, sets.classes, note)


def sized(name: str, data: Any, hint: str) -> Any:
    """A map-style set with something in it. Raises DataError."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, (str, dict)):
        raise DataError(
            f"{name} is of type {type(data).__name__}, which has no order of its own to go on from", hint=hint
        )
    if len(data) == 0:
        raise DataError(f"{name} holds no sample")
    return data


def classes_of(data: Any) -> tuple[str, ...] | None:
    """The names of the classes, where a data set has a list of them as `classes`."""
    names = getattr(data, "classes", None)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None
