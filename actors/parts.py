"""Names of what a role can put aside in host memory while another one needs its device."""

from __future__ import annotations

ENGINE_PARTS = frozenset({"weights", "kv_cache"})
"""Of a vLLM engine, by vLLM's names."""

LEARNER_PARTS = frozenset({"weights", "state"})
"""Of a learner: the model; optimizer state, fp32 copies, gradients and a frozen reference."""

MODEL_PARTS = frozenset({"weights"})
"""Of a model in inference."""
