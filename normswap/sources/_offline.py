"""The Hugging Face hub, which timm and transformers download from."""

from __future__ import annotations

import os
import socket
import sys
import urllib.parse


def stop_retries() -> None:
    """Tell huggingface_hub that it is offline when it is: it would retry for a minute, with a warning each time."""
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
            vars(constants)["HF_HUB_OFFLINE"] = True
