"""Paths of many layers in one text, for tables; see `path_ranges`."""

from __future__ import annotations

from ..path_ranges import ROOT as ROOT
from ..path_ranges import Run as Run
from ..path_ranges import collapse as collapse
from ..path_ranges import local_names as local_names
from ..path_ranges import spans as spans
