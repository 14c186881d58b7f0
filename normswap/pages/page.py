"""Write the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..display.printable import printable
from ..errors import NormswapError
from ..files.writing import atomic
from ..version import __version__

_TEMPLATE = "page.html.jinja"


def write_page(path: Path, command: str, line: str, values: Mapping[str, Any]) -> None:
    """One file that shows what a command found, to be opened in any browser, sent, or printed.

    command: its name; line: as it was typed. values: what it prints with --json. All text is escaped, and there is
    neither a script nor anything from elsewhere. Raises OutputError, and NormswapError without jinja2.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise NormswapError("a report needs jinja2", hint="pip install jinja2") from error
    from .charts import COLOURS
    from .content import content_of

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    content = content_of(values)
    text = environment.get_template(_TEMPLATE).render(
        command=command, line=line, content=content, normswap=__version__, colours=COLOURS,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        manifest=None if content.manifest is None else json.dumps(content.manifest, indent=1, ensure_ascii=False),
    )  # fmt: skip
    with atomic(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")
