"""Loads models for training and scoring, with the part that trains marked.

Two heads: a language model (policy, reference) and a scalar head on the same backbone (reward model, critic). Both are
plain transformers classes, so what is saved loads anywhere.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.errors import ConfigError
from rlhf.models import attention
from rlhf.models.adapters import attach_lora, backbone, base_model, check_targets
from rlhf.models.resolve import resolve_model
from rlhf.models.settings import ModelConfig
from rlhf.objectives.base import Head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPPORTED = "a Llama-like decoder with full attention and plain logits (Llama, Mistral, Qwen2, Qwen3, SmolLM)"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ScalarHead(nn.Linear):
    """A linear head that multiplies in fp32: bf16 scores near 4 would be 0.03 apart."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[*, D] -> float32 [*, 1]."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        ConfigError: The model cannot be found, or has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {path!r}",
            found=f"no tokenizer that can be read ({str(error).splitlines()[0][:200]})",
            needed="a tokenizer beside the model",
            action="Save it there with the tokenizer's save_pretrained.",
        ) from error
    return tokenizer


def load_policy(config: ModelConfig) -> nn.Module:
    """Loads a causal language model; with an adapter configured, a PEFT model around it.

    Raises:
        ConfigError: The model cannot be found, or cannot run on rows whose siblings share a prompt.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model(config.path)
    model = AutoModelForCausalLM.from_pretrained(path, **_load_arguments(config))
    check_architecture(model, config.path)
    return _prepare(model, config, "language_model")


def load_scalar(config: ModelConfig) -> nn.Module:
    """Loads a sequence-classification model with one label: a reward model or a critic.

    Where the checkpoint has no head (it was a language model), the head starts at zero: every score is 0, and the rank
    loss log 2, until something was learned. A random head orders siblings before it has seen a ranking: of the
    variance 1 / (D + 1) that Stiennon et al. (Learning to summarize from human feedback, appendix B.1) use, where D is
    the model's width, it started SmolLM2-135M at a rank loss of 1.1, as its last hidden states are far from unit
    variance, and the first updates went into unlearning that.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    path = resolve_model(config.path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a missing head is made below; transformers would warn of it
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, output_loading_info=True, **_load_arguments(config)
        )
    finally:
        logging.set_verbosity(verbosity)
    check_architecture(model, config.path)
    _use_scalar_head(model)
    if "score.weight" in info["missing_keys"]:
        torch.nn.init.zeros_(model.score.weight)
    model.config.pad_token_id = padding_token(path, model.config)
    return _prepare(model, config, "scalar")


def check_model(config: ModelConfig, head: Head) -> None:
    """Refuses, by ``config.json`` and tokenizer alone, what ``load_policy`` and ``load_scalar`` would refuse later.

    The model is built without memory for its weights, so that the same checks see the same modules.

    Raises:
        ConfigError: The architecture is not supported, or has not the parts that are to train.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    path = resolve_model(config.path)
    kind: Any = AutoModelForCausalLM if head == "language_model" else AutoModelForSequenceClassification
    arguments = _load_arguments(config)
    del arguments["use_safetensors"]
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False, num_labels=1)
        with torch.device("meta"):
            model: nn.Module = kind.from_config(settings, **arguments)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {config.path!r}",
            found=f"no model that transformers can build ({str(error).strip().splitlines()[0][:200]})",
            needed=SUPPORTED,
            action="Choose another model.",
        ) from error
    check_architecture(model, config.path)
    if head == "scalar":
        padding_token(path, settings)
    if config.adapter is not None:
        check_targets(model, config.adapter)
    else:
        _freeze(model, config, head)


def _load_arguments(config: ModelConfig) -> dict[str, Any]:
    return {
        "dtype": DTYPES[config.dtype],
        "attn_implementation": attention.register() if config.attention == "sdpa" else config.attention,
        "trust_remote_code": False,
        "use_safetensors": True,
    }


def _use_scalar_head(model: nn.Module) -> None:
    plain: Any = model.score
    head = ScalarHead(plain.in_features, plain.out_features, bias=plain.bias is not None, dtype=plain.weight.dtype)
    head.load_state_dict(plain.state_dict())
    model.score = head


def padding_token(path: Path, config: Any) -> int:
    """The token that pads rows of a scored sequence.

    transformers reads the score at the last token that is not padding, so padding may not be the end-of-text token: a
    completion that stops would be read one token early. Where it is, a special token with no other use takes its place.
    """
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is not None and config.pad_token_id not in stops:
        return int(config.pad_token_id)
    tokenizer = load_tokenizer(str(path))
    used = {*stops, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    spare = sorted(set(tokenizer.added_tokens_decoder) - used)
    if not spare and tokenizer.unk_token_id is not None:
        spare = [tokenizer.unk_token_id]
    if not spare:
        raise ConfigError(
            f"model {path}",
            found="no special token besides begin and end of text",
            needed="a padding token for the score head",
            action="Add a pad token to the tokenizer and set pad_token_id in config.json.",
        )
    return int(spare[0])


def check_architecture(model: nn.Module, where: str) -> None:
    """Refuses models that would be silently wrong on packed rows.

    Needed: a decoder made of embedding, layers and norm, whose forward takes a 4D mask and position ids; full attention
    in every layer (a sliding window would count the siblings before it in the row); plain logits.
    """
    text: Any = base_model(model).config
    inner = backbone(model)
    parameters = inspect.signature(inner.forward).parameters
    missing = [
        name for name in ("embed_tokens", "layers", "norm", "rotary_emb") if name not in dict(inner.named_children())
    ]
    missing += [name for name in ("attention_mask", "position_ids", "use_cache") if name not in parameters]
    settings = text.to_dict()
    kinds = set(settings.get("layer_types") or []) - {"full_attention"}
    if settings.get("use_sliding_window", "layer_types" not in settings) and settings.get("sliding_window"):
        kinds.add("sliding_attention")
    if settings.get("num_experts") or settings.get("num_local_experts"):
        kinds.add("mixture-of-experts")
    scaled = [key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling") if settings.get(key)]
    found = ""
    if missing:
        found = f"a {settings['model_type']} model without {', '.join(missing)}"
    elif kinds:
        found = f"a {settings['model_type']} model with {', '.join(sorted(kinds))} layers"
    elif scaled:
        found = f"a {settings['model_type']} model with {', '.join(scaled)}"
    if found:
        raise ConfigError(
            f"model {where!r}",
            found=found,
            needed=SUPPORTED,
            action="Choose another model.",
        )


def _prepare(model: nn.Module, config: ModelConfig, head: Head) -> nn.Module:
    if config.gradient_checkpointing:
        checkpointed: Any = model
        checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    if config.adapter is not None:
        model = attach_lora(model, config.adapter, head)
    else:
        _freeze(model, config, head)
    return model


def _freeze(model: nn.Module, config: ModelConfig, head: Head) -> None:
    if config.trainable == "all":
        return
    model.requires_grad_(False)
    tied = head == "language_model" and base_model(model).config.tie_word_embeddings
    if config.trainable == "head" and tied:
        raise ConfigError(
            "model.trainable",
            found="'head' for a model that shares it with its embeddings",
            needed="a head of its own",
            action="Set trainable: last_layers or all, or use an adapter.",
        )
    parts: list[Any] = [] if tied else [head_of(model, head)]
    if config.trainable == "last_layers":
        inner: Any = backbone(model)
        if config.last_layers > len(inner.layers):
            raise ConfigError(
                "model.last_layers",
                found=str(config.last_layers),
                needed=f"at most {len(inner.layers)}, the model's layers",
                action="Lower it.",
            )
        parts += [inner.norm, *inner.layers[-config.last_layers :]]
    for part in parts:
        part.requires_grad_(True)


def head_of(model: nn.Module, head: Head) -> nn.Module:
    """The module that turns hidden states into logits or into scores."""
    owner: Any = base_model(model)
    module: nn.Module = owner.lm_head if head == "language_model" else owner.score
    return module
