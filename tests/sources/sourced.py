"""What the tests of sources share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normswap.errors import NormswapError, OptionError, SourceError, WeightsError

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def refused(call: Any, *args: Any, **kwargs: Any) -> NormswapError:
    with pytest.raises((OptionError, SourceError, WeightsError)) as caught:
        call(*args, **kwargs)
    return caught.value
