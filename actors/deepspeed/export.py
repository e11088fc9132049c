"""Weights on their way out of the learner: as buckets to the engines and as a folder in Hugging Face layout.

Both send the same tensors: adapters merged, tied embeddings once, in the dtype that the model computes in. No more than
one bucket (or one shard of the folder) is gathered at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.deepspeed.engine import TrainEngine
from rlhf.models.adapters import ADAPTER, base_model, export_parameters, has_adapter
from rlhf.models.load import DTYPES
from rlhf.weights import ITEM_BYTES, Bucket, make_bucket, plan_buckets

SHARD_BYTES = 4 << 30
ADAPTER_FOLDER = "adapter"


class WeightExporter:
    """Gathers weights of one engine's model; every rank calls every method, rank 0 gets the result.

    Args:
        engine: Holds the weights.
        model: The transformers or PEFT model inside it.
        rank: This rank.
        dtype: What leaves, unless a plan asks for another.
    """

    def __init__(self, engine: TrainEngine, model: nn.Module, *, rank: int, dtype: str) -> None:
        self._engine = engine
        self._model = model
        self._rank = rank
        self._dtype = dtype
        self._planned: tuple[list[list[str]], str] = ([], dtype)

    def plan(self, bucket_bytes: int, dtype: str | None = None) -> list[list[str]]:
        """Splits the model into buckets and keeps the plan for ``bucket``; the names in each bucket."""
        wanted = dtype or self._dtype
        names = self._plan(bucket_bytes, wanted)
        self._planned = (names, wanted)
        return names

    def _plan(self, bucket_bytes: int, dtype: str) -> list[list[str]]:
        shapes = {name: shape for name, (shape, _, _) in export_parameters(self._model).items()}
        sizes = {name: torch.Size(shape).numel() * ITEM_BYTES[dtype] for name, shape in shapes.items()}
        return plan_buckets(sizes, bucket_bytes)

    def bucket(self, index: int) -> Bucket | None:
        """One bucket of the last plan; None on ranks other than 0."""
        plan, dtype = self._planned
        tensors = self._collect(plan[index], dtype)
        return make_bucket(index, len(plan), tensors) if self._rank == 0 else None

    def _collect(self, names: Sequence[str], dtype: str) -> dict[str, Tensor]:
        """The named tensors on the host; empty on ranks other than 0."""
        exported = export_parameters(self._model)
        parameters = [parameter for name in names for parameter in exported[name][1]]
        with self._engine.gathered(parameters):
            if self._rank != 0:
                return {}
            return {name: exported[name][2]().to("cpu", DTYPES[dtype], copy=True).contiguous() for name in names}

    def write(self, folder: Path) -> None:
        """Writes model and configuration, and the adapter alone in PEFT layout where there is one."""
        plan = self._plan(SHARD_BYTES, self._dtype)
        index: dict[str, str] = {}
        total = 0
        for number, names in enumerate(plan, 1):
            tensors = self._collect(names, self._dtype)
            if self._rank == 0:
                from safetensors.torch import save_file

                file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
                save_file(tensors, folder / file, metadata={"format": "pt"})
                index |= dict.fromkeys(names, file)
                total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._rank == 0:
            if len(plan) > 1:
                listing = {"metadata": {"total_size": total}, "weight_map": index}
                (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2), encoding="utf-8")
            self._write_settings(folder)
        if has_adapter(self._model):
            self._write_adapter(folder / ADAPTER_FOLDER)

    def _write_settings(self, folder: Path) -> None:
        inner = base_model(self._model)
        inner.config.architectures = [type(inner).__name__]
        inner.config.dtype = DTYPES[self._dtype]
        inner.config.save_pretrained(folder)
        if inner.can_generate():
            inner.generation_config.save_pretrained(folder)

    def _write_adapter(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict

        wrapped: Any = self._model
        with self._engine.gathered([p for p in wrapped.parameters() if p.requires_grad]):
            if self._rank == 0:
                state = {name: p.detach() for name, p in wrapped.named_parameters()}
                wanted = get_peft_model_state_dict(wrapped, state_dict=state, save_embedding_layers=False)
                folder.mkdir(exist_ok=True)
                from safetensors.torch import save_file

                tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in wanted.items()}
                save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
                wrapped.peft_config[ADAPTER].save_pretrained(folder)
