"""The classes of the data as the network numbers them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError, did_you_mean

BACKGROUND = "__background__"
"""What torchvision calls class 0 of its detectors."""


@dataclass(frozen=True)
class Classes:
    """Names of the data's classes and of the network's; None where they are not known.

    first: the number of the data's first class, 1 where 0 is the background. Classes that the network knows by name are
    found by it, and a part of the network's classes by numbers, as folders called 007 have it; otherwise both have to
    be equally many, and are taken to be in the same order.
    """

    data: tuple[str, ...] | None = None
    network: tuple[str, ...] | None = None
    first: int = 0

    def note(self, known: int) -> str:
        """How classes were found, where the order alone does not say it. known: how many the network tells apart."""
        found, how = self._found(known)
        count = len(self.data or ())
        if found is None and self.data is not None and not self._numbers_of_places():
            names = "no names" if self.network is None or len(self.network) != known else "other names"
            return f"the network's classes have {names}: the {count} of the data are taken for them in their order"
        plain = found is None or found == [*range(self.first, known)]
        return "" if plain else f"the {count} classes of the data are found by their {how}"

    def _numbers_of_places(self) -> bool:
        """Whether the data's classes are called by the numbers that they get, so that no name is passed over."""
        data = self.data or ()
        return all(name.isdecimal() and int(name) == i for i, name in enumerate(data, self.first))

    def names(self, known: int) -> tuple[str, ...]:
        """Of the network's classes."""
        if self.network is not None and len(self.network) == known:
            return self.network
        if self.data is not None and len(self.data) + self.first == known:
            return (*[BACKGROUND] * self.first, *self.data)
        return tuple(map(str, range(known)))

    def numbered(self, labels: Tensor, known: int) -> Tensor:
        """The data's labels, int64 of any shape, as the network numbers them. Raises DataError if that is unclear."""
        found, _ = self._found(known)
        if found is not None:
            table = torch.tensor([*range(self.first), *found], device=labels.device)
            return table[labels]
        if self.data is not None and len(self.data) + self.first != known:
            raise self._unclear(known)
        return labels

    def _found(self, known: int) -> tuple[list[int] | None, str]:
        """The network's number of each class of the data, and by what it was found."""
        data, names = self.data, self.network
        if data is not None and names is not None and len(names) == known and set(data) <= set(names):
            return [names.index(name) for name in data], "names"
        if data is not None and len(data) + self.first != known and all(name.isdecimal() for name in data):
            numbers = [int(name) for name in data]
            if max(numbers) < known and len(set(numbers)) == len(numbers):
                return numbers, "numbers"
        return None, ""

    def _unclear(self, known: int) -> DataError:
        data = self.data or ()
        text = f"the data has {len(data)} classes, the network tells {known - self.first} apart"
        if self.network is None or len(self.network) != known:
            return DataError(text, hint="Give data with the network's classes, in the network's order.")
        missing = next(name for name in data if name not in self.network)
        near = did_you_mean(missing, self.network)
        return DataError(
            f"{text}, and none of them is called {missing!r}",
            hint=" ".join(filter(None, [near, "Name the classes as the network does, such as", repr(self.network[-1])]))
            + ".",
        )
