"""A trained model in a folder of its own, as transformers and vLLM load it: whole, in several files, or adapters merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from drift import files
from drift.config import Config, load
from drift.jobs.folder import RunError

BASE = "base_model_name_or_path"


def export(run: Path, out: Path | None = None, *, merge_lora: bool = False, shard_size: str | None = None) -> Path:
    """Writes the model that `run` trained to `out`, by default RUN/export, and returns that folder.

    run: a run's folder, of which the first seed's last arm is taken, or the folder of one trained model.
    merge_lora: adapters are added to the weights of their base. shard_size: of a file at most, such as "5GB"; without it the
    files stay as they are. Raises RunError for a run that is absent or unfinished, and for a model that is damaged.
    """
    source, config = _trained(run)
    out = out or run / "export"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(
            f"--out {str(out)!r} is there already, and is not overwritten; name another folder, or remove it"
        )
    if damage := files.damage(source):
        raise RunError(f"{source} is damaged: {damage}; have it trained again, or take another copy")
    adapters = (source / "adapter_config.json").is_file()
    if merge_lora and not adapters:
        raise RunError(f"--merge-lora: {source} holds no adapters; leave it out")
    if shard_size is not None and adapters and not merge_lora:
        raise RunError(f"--shard-size {shard_size!r}: adapters are one file; say --merge-lora too, or leave it out")
    model = None
    if merge_lora or shard_size is not None:
        model = _merged(source, config) if merge_lora else _whole(str(source), None)
    with files.into(out) as partial:
        for name in _listed(source):
            if model is None or not name.startswith(("model", "adapter", "config.json", "generation_config", "README")):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, partial / name)
        if model is not None:
            model.save_pretrained(partial, **({} if shard_size is None else {"max_shard_size": shard_size}))
    return out


def _trained(run: Path) -> tuple[Path, Config | None]:
    """(the folder of a trained model, the config of its run if that is known)."""
    if not run.is_dir():
        raise RunError(f"RUN {str(run)!r} is not a folder; a run writes to output_dir/name")
    if (run / "config.yaml").is_file():
        config = load(run / "config.yaml")
        source = run / f"seed-{config.seeds[0]}" / config.trained[-1]
        if not (source / files.MANIFEST).is_file():
            raise RunError(
                f"{run} is not finished: {source} holds no model yet; the command that began it continues it"
            )
        return source, config
    if not (run / files.MANIFEST).is_file() or not _is_model(run):
        unfinished = sorted(run.glob("*/checkpoint-*"))
        reason = f"its training is not finished (there is {unfinished[-1]})" if unfinished else "it holds no model"
        raise RunError(
            f"RUN {str(run)!r} cannot be exported: {reason}; name a run's folder, or that of a trained model"
        )
    return run, None


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _listed(source: Path) -> list[str]:
    """The files of the model, without the run's other files."""
    return sorted(json.loads((source / files.MANIFEST).read_text(encoding="utf-8"))["files"])


def _whole(path: str, dtype: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", trust_remote_code=False)


def _merged(source: Path, config: Config | None) -> Any:
    from peft import PeftModel

    base = json.loads((source / "adapter_config.json").read_text(encoding="utf-8")).get(BASE)
    if not base:
        raise RunError(
            f"--merge-lora: {source} does not say which base its adapters are of ({BASE} in adapter_config.json): a model with "
            "random weights, which is kept nowhere; leave --merge-lora out"
        )
    model = _whole(base, config.model.dtype if config else None)
    return PeftModel.from_pretrained(model, str(source), trust_remote_code=False).merge_and_unload()
