"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685): attaching, switching off, merging for export.

Also the one place that knows how a PEFT model wraps a transformers model, and under which names tensors leave.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import ConfigError
from rlhf.models.settings import LoraConfig
from rlhf.objectives.base import Head

ADAPTER = "default"


def base_model(model: nn.Module) -> Any:
    """The transformers model, whether or not PEFT wraps it."""
    wrapped: Any = model
    return wrapped.get_base_model() if has_adapter(model) else model


def backbone(model: nn.Module) -> nn.Module:
    """The decoder below the head."""
    inner = base_model(model)
    module: nn.Module = getattr(inner, inner.base_model_prefix)
    return module


def has_adapter(model: nn.Module) -> bool:
    """True for a PEFT model; PEFT is not imported to find out, which would take seconds."""
    return hasattr(model, "get_base_model")


def attach_lora(model: nn.Module, config: LoraConfig, head: Head) -> nn.Module:
    """Wraps a transformers model; its own weights are frozen, a scalar head trains in full."""
    import peft

    check_targets(model, config)
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type=peft.TaskType.CAUSAL_LM if head == "language_model" else peft.TaskType.SEQ_CLS,
        modules_to_save=None if head == "language_model" else ["score"],
    )
    inner: Any = model
    return peft.get_peft_model(inner, settings, adapter_name=ADAPTER, autocast_adapter_dtype=False)


def check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Every target is a linear layer of the model; ``ConfigError`` with the names that there are otherwise.

    PEFT looks for one match among all targets only, and takes an embedding too, which cannot be merged for export.
    """
    if isinstance(config.targets, str):
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    unknown = [target for target in config.targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown or not config.targets:
        below_head = {
            name.rpartition(".")[2] for name, m in backbone(model).named_modules() if isinstance(m, nn.Linear)
        }
        raise ConfigError(
            "model.adapter.targets",
            found=", ".join(map(repr, unknown)) or "no names",
            needed=f"linear layers of the model: {', '.join(sorted(below_head))}",
            action="Mend the names, or set targets: all-linear.",
        )


def without_adapter(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which the model computes as it did before the adapter: the reference. No adapter, no change."""
    wrapped: Any = model
    return wrapped.disable_adapter() if has_adapter(model) else nullcontext()


def export_parameters(model: nn.Module) -> dict[str, tuple[tuple[int, ...], list[nn.Parameter], Callable[[], Tensor]]]:
    """What leaves the model, by Hugging Face name, adapters merged and tied weights once.

    Returns:
        Name -> (shape, the parameters that it is made of, a function that computes it). Sharded parameters have to be
        gathered around the call; shape is that of the whole tensor.
    """
    from peft.tuners.lora import LoraLayer

    root = base_model(model)
    layers = {name: module for name, module in root.named_modules() if isinstance(module, LoraLayer)}
    exported: dict[str, tuple[tuple[int, ...], list[nn.Parameter], Callable[[], Tensor]]] = {}
    for name, parameter in root.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module_name = owner.removesuffix(".base_layer")
        if owner.endswith(".base_layer"):
            layer = layers[module_name]
            parts = [parameter]
            if leaf == "weight":
                parts += [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
                exported[f"{module_name}.{leaf}"] = (full_shape(parameter), parts, _merger(layer))
                continue
        elif ".original_module." in name or ".lora_A." in name or ".lora_B." in name:
            continue
        final = f"{module_name}.{leaf}".replace(f".modules_to_save.{ADAPTER}", "")
        exported[final] = (full_shape(parameter), [parameter], _reader(parameter))
    return exported


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter even where this rank holds a shard of it (DeepSpeed marks those with ``ds_shape``)."""
    return tuple(vars(parameter).get("ds_shape", parameter.shape))


def _reader(parameter: nn.Parameter) -> Callable[[], Tensor]:
    return lambda: parameter.detach()


def _merger(layer: Any) -> Callable[[], Tensor]:
    def merged() -> Tensor:
        with torch.no_grad():
            weight = layer.base_layer.weight
            update = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
            return (weight.float() + layer.scaling[ADAPTER] * update).to(weight.dtype)

    return merged
