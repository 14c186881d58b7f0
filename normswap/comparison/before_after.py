"""What a repair or a training has done to a network's distance from its original, for the reports of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import plural
from .outputs import OutputTally


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """Figures over `compared` images, of the network as it came and as it is.

    drift: relative error `|out - original| / |original|` of the output; agreement: share of images decided alike; None
    where outputs do not compare so (detections). accuracy: of the original, before and after, where labels came.
    """

    compared: int = 0
    drift_before: float | None = None
    drift_after: float | None = None
    agreement_before: float | None = None
    agreement_after: float | None = None
    accuracy_original: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    @property
    def fitted(self) -> bool:
        """Whether the network was fitted to the very images compared, so that on others it does less well."""
        return False

    def lines(self) -> list[str]:
        """Those figures that there are."""
        found = []
        fitted = " that it was calibrated on" if self.fitted else ""
        if self.drift_before is not None and self.drift_after is not None:
            on = f" (on {plural(self.compared, 'image')}{fitted})"
            found.append(f"output drift: {self.drift_before:.3g} -> {self.drift_after:.3g}{on}")
        if self.agreement_before is not None and self.agreement_after is not None:
            found.append(
                f"agreement: {self.agreement_before:.1%} -> {self.agreement_after:.1%}{' on these' if fitted else ''}"
            )
        if self.accuracy_before is not None and self.accuracy_after is not None:
            before, after = f"{self.accuracy_before:.1%}", f"{self.accuracy_after:.1%}"
            found.append(
                f"accuracy: {before} -> {after} (original {self.accuracy_original:.1%}){' on these' if fitted else ''}"
            )
        if fitted and found:
            found.append("on other images it may do less well: normswap.verify tells")
        return found


def before_after(before: OutputTally, after: OutputTally) -> dict[str, Any]:
    """The fields of `BeforeAfter` from what was counted, each tally against the original."""
    found: dict[str, Any] = {}
    for when, tally in (("before", before), ("after", after)):
        total = tally.total()
        found[f"drift_{when}"] = None if total is None else total.relative
        found[f"agreement_{when}"] = tally.agreement()
        if tally.labelled:
            found["accuracy_original"], found[f"accuracy_{when}"] = (n / tally.labelled for n in tally.correct)
    return found
