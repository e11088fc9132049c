"""An engine that is cut over several GPUs: whether its replica has them, and whether the model can be cut so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.errors import PlacementError


def check_gpus(role: str, pieces: int, gpus: float) -> None:
    """One GPU for each piece of the weights; a fraction of a GPU holds all of them, and on a CPU there is none.

    Args:
        role: Section of the role.
        pieces: Its ``engine.tensor_parallel_size``.
        gpus: Its ``resources.gpus``: what one replica's bundle reserves, on one node.

    Raises:
        PlacementError: The two do not agree.
    """
    if gpus and pieces != max(gpus, 1.0):
        raise PlacementError(
            f"role {role}",
            found=f"engine.tensor_parallel_size {pieces} and {gpus:g} GPUs for a replica",
            needed=f"{pieces} GPUs for each replica, all on one node",
            action=f"Set roles.{role}.resources.gpus={pieces}, or another tensor_parallel_size.",
        )


def check_heads(role: str, pieces: int, model: Path) -> None:
    """Every piece holds as many attention heads as the others, and whole key-value heads.

    Key-value heads that are fewer than the pieces are copied, each as often as the others.

    Args:
        role: Section of the role.
        pieces: Its ``engine.tensor_parallel_size``.
        model: Folder in Hugging Face layout; a configuration that names no heads is left to vLLM.

    Raises:
        PlacementError: The heads cannot be shared out evenly.
    """
    settings: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if "num_attention_heads" not in settings:
        settings = settings.get("text_config") or {}
    heads = settings.get("num_attention_heads")
    if not isinstance(heads, int):
        return
    shared = settings.get("num_key_value_heads") or heads
    fitting = [size for size in range(1, heads + 1) if heads % size == 0 and 0 in (shared % size, size % shared)]
    if pieces not in fitting:
        raise PlacementError(
            f"role {role}",
            found=f"engine.tensor_parallel_size {pieces} for a model with {heads} attention heads, {shared} of keys",
            needed=f"one of {', '.join(map(str, fitting))}",
            action=f"Change roles.{role}.engine.tensor_parallel_size and its GPUs.",
        )
