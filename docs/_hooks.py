"""Fills the reference pages from the code while the documentation is built.

Each of these pages says in Markdown what the code cannot, and holds MARKER where the code speaks for itself.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
from pathlib import PurePosixPath
from typing import Any

MARKER = "<!-- generated -->"
NORMS, COMMANDS = "Norms", "Commands"
MATRIX = "<!-- matrix -->"


def on_config(config: Any) -> Any:
    """The hook that mkdocs calls first: the pages of norms and commands take their places in `nav`, in their order."""
    for entry in config.nav:
        for title, pages in ((NORMS, norm_pages), (COMMANDS, command_pages)):
            if title in entry:
                entry[title] = pages()
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The hook that mkdocs calls for every page."""
    markdown = markdown.replace(MATRIX, norm_matrix() if MATRIX in markdown else "")
    if MARKER not in markdown:
        return markdown
    path = PurePosixPath(page.file.src_uri)
    references = {"cli": command_reference, "api": api_reference, "recipes": recipe_headers, "index": norm_links}
    of_folder = {"commands": command_page, "norms": norm_facts}.get(path.parent.name)
    return markdown.replace(MARKER, of_folder(path.stem) if of_folder else references[path.stem]())


# --- the command line ---------------------------------------------------------------------------------------------


def command_reference() -> str:
    """What goes for all commands, and the page of each with what it does."""
    context, root, commands = _commands()
    links = [f"- [`normswap {name}`](commands/{name}.md): {_escape(c.get_short_help_str(200))}" for name, c in commands]
    return "\n\n".join([*_options(context, root), "\n".join(links)])


def command_page(name: str) -> str:
    """One command with its usage, help, arguments and options, read from the command tree."""
    context, _, commands = _commands()
    command = dict(commands)[name]
    own = context.__class__(command, info_name=name, parent=context)
    usage = " ".join([own.command_path, *command.collect_usage_pieces(own)])
    return "\n\n".join([_help_text(command.help or ""), f"```text\n{usage}\n```", *_options(own, command)])


def command_pages() -> list[dict[str, str]]:
    """The page of each command, by its name, in the order of --help."""
    return [{name: f"commands/{name}.md"} for name, _ in _commands()[2]]


def _commands() -> tuple[Any, Any, list[tuple[str, Any]]]:
    """The context of the whole, the whole, and the commands that are shown, by name."""
    import typer

    from normswap.cli import app

    root = app if hasattr(app, "list_commands") else typer.main.get_command(app)
    context = root.context_class(root, info_name="normswap")
    found = [(name, root.get_command(context, name)) for name in root.list_commands(context)]
    return context, root, [(name, command) for name, command in found if not command.hidden]


def _options(context: Any, command: Any) -> list[str]:
    parts = []
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        records = [p.get_help_record(context) for p in command.get_params(context) if p.param_type_name == kind]
        lines = [f"`{names}`\n:   {_escape(text) or '—'}" for names, text in filter(None, records) if names != "--help"]
        if lines:
            parts += [f"**{title}**", "\n\n".join(lines)]
    return parts


def _help_text(text: str) -> str:
    r"""Paragraphs as they are; one that begins with `\b` (kept as written by the command line) as a code block."""
    paragraphs = inspect.cleandoc(text.split("\f")[0]).split("\n\n")
    return "\n\n".join(f"```text\n{p[1:].strip(chr(10))}\n```" if p[:1] == "\b" else _escape(p) for p in paragraphs)


def _escape(text: str) -> str:
    """Plain text as Markdown; spans in backticks stay code."""
    spans = re.split(r"(`[^`]*`)", text)
    return "".join(
        s if i % 2 else re.sub(r"([\\*_\[\]])", r"\\\1", html.escape(s, quote=False)) for i, s in enumerate(spans)
    )


# --- the Python API -----------------------------------------------------------------------------------------------


def api_reference() -> str:
    """Every public name, under the name a caller uses, in the order of `normswap.__all__`."""
    import normswap

    sections: dict[str, list[str]] = {"Functions": [], "Types": [], "Errors": []}
    for name in normswap.__all__:
        public = getattr(normswap, name)
        if inspect.isclass(public):
            sections["Errors" if issubclass(public, Exception) else "Types"].append(_documented(name, public))
        elif inspect.isfunction(public):
            sections["Functions"].append(_documented(name, public))
    return "\n\n".join("\n\n".join([f"## {title}", *entries]) for title, entries in sections.items() if entries)


def _documented(name: str, public: Any) -> str:
    place = f"{public.__module__}.{public.__qualname__}"
    return f"::: {place}\n    options:\n      heading: normswap.{name}\n      toc_label: {name}"


# --- the recipes --------------------------------------------------------------------------------------------------


def recipe_headers() -> str:
    """What each recipe says of itself."""
    from normswap.cli.recipe_catalog import recipes

    return "\n\n".join(
        f"## {r.name}\n\n{_escape(r.title)}\n\n```text\n{r.command}\n```\n\n"
        f"Goal\n:   {_escape(r.goal)}\n\nTime\n:   {_escape(r.time)}\n\nExpected\n:   {_escape(r.expected)}"
        for r in recipes()
    )


# --- the norms ----------------------------------------------------------------------------------------------------


def norm_pages() -> list[dict[str, str]]:
    """The page of each norm, by its name."""
    from normswap.norms.registry import specs

    return [{spec.name: f"norms/{spec.name}.md"} for spec in specs()]


def norm_links() -> str:
    """The same as links of the first page."""
    return ", ".join(f"[{name}]({path})" for page in norm_pages() for name, path in page.items())


def norm_facts(name: str) -> str:
    """What `normswap norms` knows of one norm, and the options of its own."""
    from normswap.norms.registry import norm_named, specs
    from normswap.planning.matrix import conversions

    spec = norm_named(name)
    exact = [cell.source for cell in conversions(specs(), (spec,)) if cell.outcome == "exact"]
    facts = {
        "Formula": f"`{spec.formula}`",
        "Statistics over": spec.axes,
        "Source": spec.source,
        "Exact in inference from": ", ".join(f"`{other}`" for other in exact) or "no other norm",
        "Options": ", ".join(f"`{f.name}`" for f in dataclasses.fields(spec.options)),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| **{what}** | {text} |" for what, text in facts.items())])


def norm_matrix() -> str:
    """What `normswap norms` says of every conversion: a row a source, a column a target."""
    from normswap.planning.matrix import all_conversions, notes

    cells = all_conversions()
    sources, targets = list(dict.fromkeys(c.source for c in cells)), list(dict.fromkeys(c.target for c in cells))
    at = {(c.source, c.target): c for c in cells}
    head = ["| from ↓ to → | " + " | ".join(f"`{name}`" for name in targets) + " |", "|---" * (len(targets) + 1) + "|"]
    rows = [f"| `{s}` | " + " | ".join(str(at[s, t].outcome) for t in targets) + " |" for s in sources]
    return "\n".join([*head, *rows, "", *(f"- {note}" for note in notes(cells))])
