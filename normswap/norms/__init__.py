"""The norm types. Each file registers its own; importing this package makes them all known.

Files are imported by their names, in order: that is the order of `normswap norms`.
"""

import importlib
import pkgutil

for _file in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_file}")
