"""Model cards: the README.md of an exported policy or reward model, from the run's summary and configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.evaluation.bootstrap import Interval
from rlhf.runs.files import write_text
from rlhf.runs.redact import redact
from rlhf.runs.summary import DISPLAY, Summary

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*$")
_TOLD = frozenset({"steps", "epochs", "kind", "name", "lr", "num_samples", "prompts_per_step", "beta"})
"""Last parts of the configuration keys that a card tells of each stage."""


def write_policy_card(directory: Path, summary: Summary, config: Mapping[str, Any]) -> Path:
    """Writes ``README.md`` beside an exported policy.

    Args:
        directory: The exported model.
        summary: The run's results.
        config: The resolved configuration as a plain mapping.

    Returns:
        Path of the card.
    """
    base = str(config.get("model", "unknown"))
    lines = _front_matter(base, "text-generation", ["rlhf", "reinforcement-learning"])
    lines += [f"# {summary.recipe}: policy", "", f"A language model trained from `{base}` with the recipe below.", ""]
    lines += _method(config)
    lines += _evaluation(summary)
    lines += _limits(summary) + _origin(summary)
    return _write(directory, lines)


def write_reward_model_card(directory: Path, summary: Summary, config: Mapping[str, Any]) -> Path:
    """Writes ``README.md`` beside an exported reward model; arguments as for ``write_policy_card``."""
    base = str(config.get("model", "unknown"))
    lines = _front_matter(base, "text-classification", ["rlhf", "reward-model"])
    lines += [
        f"# {summary.recipe}: reward model",
        "",
        f"A scalar head on `{base}`, trained with rank loss on rankings of completions. Load it with",
        "`AutoModelForSequenceClassification.from_pretrained`: the only logit is the score. Higher is better; only",
        "differences between completions of one prompt mean anything.",
        "",
    ]
    lines += _method(config)
    if summary.reward_model is not None:
        model = summary.reward_model
        lines += ["## Results on held-out rankings", "", "| measure | value | 95 % interval |", "|---|---|---|"]
        lines += [_row("pair accuracy", model.pair_accuracy), _row("Kendall tau", model.kendall_tau), ""]
        lines += [f"{model.num_pairs} ranked pairs.", ""]
        if model.judge_agreement is not None:
            found = f"An independent scorer orders {model.judge_agreement} of the same pairs as the judge did."
            lines += [found, ""]
    lines += _limits(summary) + _origin(summary)
    return _write(directory, lines)


def _front_matter(base: str, pipeline: str, tags: list[str]) -> list[str]:
    named = [f"base_model: {base}"] if _HUB_ID.match(base) else []
    lines = ["---", "library_name: transformers", f"pipeline_tag: {pipeline}", *named, "tags:"]
    return [*lines, *(f"- {tag}" for tag in tags), "---", ""]


def _method(config: Mapping[str, Any]) -> list[str]:
    lines = ["## Method", ""]
    for stage in config.get("stages") or []:
        kind = stage.get("kind", "stage")
        told = [f"{key} {value}" for key, value in _leaves(stage) if _is_told(key, value)]
        lines.append(f"- **{stage.get('name', kind)}** ({kind}): {', '.join(told) or 'defaults'}")
    data = {
        key: value for key, value in _leaves(config.get("data") or {}) if key.rpartition(".")[2] == "path" and value
    }
    lines += ["", "## Data", ""] + [f"- {key.removesuffix('.path')}: `{value}`" for key, value in data.items()]
    return [*lines, ""]


def _is_told(key: str, value: Any) -> bool:
    return "." in key and key.rpartition(".")[2] in _TOLD and value is not None


def _leaves(node: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [leaf for name, value in node.items() for leaf in _leaves(value, f"{key}.{name}" if key else str(name))]
    if isinstance(node, list):
        return [leaf for index, value in enumerate(node) for leaf in _leaves(value, f"{key}.{index}")]
    return [(key, node)]


def _row(label: str, interval: Interval | None) -> str:
    if interval is None:
        return f"| {label} | unknown | |"
    return f"| {label} | {interval.mean:.3f} | {interval.low:.3f} to {interval.high:.3f} |"


def _evaluation(summary: Summary) -> list[str]:
    result = summary.eval
    if result is None:
        return []
    lines = [
        "## Results",
        "",
        f"{result.num_prompts} held-out prompts, {result.told_confidence} bootstrap intervals by prompt.",
        "",
        "| measure | before | after | change |",
        "|---|---|---|---|",
    ]
    for name, label in DISPLAY:
        if name in result.after:
            parts = [str(side[name]) if name in side else "-" for side in (result.before, result.after, result.delta)]
            lines.append(f"| {label} | " + " | ".join(parts) + " |")
    for name, part in result.slices.items():
        if "follows_request" in part.after:
            parts = [str(side["follows_request"]) for side in (part.before, part.after, part.delta)]
            lines.append(f"| follows the request, {name} | " + " | ".join(parts) + " |")
    if result.win_rate is not None:
        lines += ["", f"Win rate against the starting model by the judge's margin: {result.win_rate}."]
    return [*lines, ""]


def _limits(summary: Summary) -> list[str]:
    lines = ["## Limits", "", "- The model learned what its feedback rewards, which is not all of what people want."]
    lines.append("- Nothing was measured outside of the prompts described here; check it on your own before use.")
    if summary.eval is not None and summary.eval.worst_slice:
        lines.append(f"- It does worst on the slice `{summary.eval.worst_slice}`.")
    lines += [f"- Criterion not met: `{name}`." for name, met in summary.passed.items() if not met]
    lines += [f"- {note}" for note in summary.notes]
    lines.append("- The licence of the starting model and of the data applies.")
    return [*lines, ""]


def _origin(summary: Summary) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    return ["## Origin", "", f"Seed {summary.seed}. Made with {versions}.", ""]


def _write(directory: Path, lines: list[str]) -> Path:
    path = directory / "README.md"
    write_text(path, redact("\n".join(lines)))
    return path
