"""The licenses that the Hugging Face hub knows by name."""

from __future__ import annotations

from ..errors import did_you_mean

_USUAL = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "gpl-3.0", "openrail", "other")
LICENSES = (
    *_USUAL,
    *"unknown bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m".split(),
    *"afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5".split(),
    *"cc-by-3.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nd-4.0 cc-by-nc-nd-3.0".split(),
    *"cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0".split(),
    *"cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl".split(),
    *"gpl-2.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr".split(),
    *"mpl-2.0 odc-by odbl openmdw-1.0 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr".split(),
    *"deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3".split(),
    *"llama4 gemma openrail++".split(),
)
"""What the hub knows: https://huggingface.co/docs/hub/repositories-licenses."""


def unknown_license(name: str | None) -> str | None:
    """What to say of a license that the hub does not know; None for one that it does."""
    if name is None or name in LICENSES:
        return None
    near = did_you_mean(name, LICENSES)
    return f"the hub knows no license {name!r}; usual ones are {', '.join(_USUAL)}" + f". {near}" * bool(near)
