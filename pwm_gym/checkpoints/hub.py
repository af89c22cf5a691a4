"""Files by path or from the Hugging Face hub."""

from __future__ import annotations

import os
import pathlib
import re

__all__ = ["local_file"]

_SCHEME = "hf://"
_ADDRESS = re.compile(_SCHEME + r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


def local_file(source: str | os.PathLike[str]) -> pathlib.Path:
    """Find a file on this machine, after downloading it where it is on the Hugging Face hub.

    A download goes to huggingface_hub's cache and is checked there; the next time nothing is fetched but its version.
    With HF_HUB_OFFLINE=1, or without a network, the cache alone is asked. HF_HOME, HF_TOKEN and the like work as usual.

    Args:
        source: A path, or "hf://owner/repository/path/in/it", with "@revision" after the repository for another
            branch, tag or commit than its main branch.

    Raises:
        FileNotFoundError: If the hub has no such file, or can't be reached and the cache doesn't hold it.
        ImportError: If huggingface_hub is needed and not installed.
        ValueError: If `source` starts with "hf://" and is no such address.

    Example:
        >>> local_file("model.pt").name
        'model.pt'
    """
    text = os.fspath(source)
    if not text.startswith(_SCHEME):
        return pathlib.Path(text)
    address = _ADDRESS.fullmatch(text)
    if address is None:
        raise ValueError(f"expected hf://owner/repository/path/in/it, got {text!r}.")
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"expected huggingface_hub for {text!r}. Install it with pip install 'pwm-gym[hub]', or download the file "
            f"and give its path."
        ) from error
    try:
        return pathlib.Path(hf_hub_download(address["repo"], address["file"], revision=address["revision"]))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"expected {text!r} on the hub or in its cache, got neither: the hub can't be reached, or HF_HUB_OFFLINE "
            f"is set. Go online, or download the file elsewhere and give its path."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"expected {text!r} on the hub, got no such repository, revision or file ({type(error).__name__}). Check "
            f"the address; a private or gated repository needs HF_TOKEN."
        ) from error
