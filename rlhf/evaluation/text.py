"""Measures of texts that need no model: diversity, repetition, length, being on topic."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_STOP_WORDS = frozenset(
    {"a", "an", "the", "of", "in", "on", "at", "to", "for", "from", "with", "without", "by", "about", "into", "over"}
    | {"under", "and", "or", "but", "who", "that", "which", "whose", "where", "when", "is", "are", "was", "were", "be"}
    | {"been", "being", "it", "its", "this", "these", "those", "his", "her", "their", "some", "any", "no", "not", "as"}
)
_ENDINGS = ("ing", "ies", "ied", "es", "ed", "er", "y", "s", "e")
_SHORTEST_STEM = 3


def words(text: str) -> list[str]:
    """Lower-case words of a text; punctuation is left out, an apostrophe inside a word stays."""
    return [match.group().lower() for match in _WORD.finditer(text)]


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of ``n`` words."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams over all n-grams of a set of texts (Li et al. 2016, arXiv:1510.03055, section 5.3).

    It falls as the set grows, so compare sets of equally many texts. Without any n-gram it is 0.
    """
    counts = Counter(gram for text in texts for gram in ngrams(words(text), n))
    total = counts.total()
    return len(counts) / total if total else 0.0


def distinct_n_left_out(texts: Sequence[str], clusters: Sequence[Hashable], n: int = 2) -> list[float]:
    """``distinct_n`` of the set without each cluster's texts, clusters in the order in which they first occur."""
    grams: dict[Hashable, Counter[tuple[str, ...]]] = {}
    for cluster, text in zip(clusters, texts, strict=True):
        grams.setdefault(cluster, Counter()).update(ngrams(words(text), n))
    all_counts: Counter[tuple[str, ...]] = Counter()
    for counts in grams.values():
        all_counts.update(counts)
    total = all_counts.total()
    values = []
    for counts in grams.values():
        only_here = sum(all_counts[gram] == count for gram, count in counts.items())
        rest = total - counts.total()
        values.append((len(all_counts) - only_here) / rest if rest else 0.0)
    return values


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's n-grams that occurred in it before; 0 is no repetition, near 1 is one phrase over and over."""
    grams = ngrams(words(text), n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def word_count(text: str) -> int:
    """Number of words."""
    return len(words(text))


def measure_texts(texts: Sequence[str], subjects: Sequence[tuple[str, str]]) -> dict[str, float]:
    """What a score may hide, of a set of texts: mean length in words, diversity, and the share that is on topic.

    Args:
        texts: The completions.
        subjects: Subject and keywords of each (see ``on_topic``), both empty where its prompt names none.

    Returns:
        ``words``, ``distinct_2``, and ``on_topic`` over the texts that have a subject, if any has.
    """
    measures = {"words": sum(map(word_count, texts)) / len(texts), "distinct_2": distinct_n(texts)}
    kept = [on_topic(text, *about) for text, about in zip(texts, subjects, strict=True) if any(about)]
    return measures | ({"on_topic": sum(kept) / len(kept)} if kept else {})


def stem(word: str) -> str:
    """A word without one common English ending, so that ``pirates`` and ``pirate`` meet.

    One ending is cut and at least three letters stay: crude on purpose, it only has to match a subject's own forms.
    """
    word = re.sub(r"['’]s?$", "", word.lower())
    for ending in _ENDINGS:
        if ending == "s" and word.endswith("ss"):
            continue
        if word.endswith(ending) and len(word) - len(ending) >= _SHORTEST_STEM:
            return word[: -len(ending)]
    return word


def subject_stems(subject: str) -> tuple[str, ...]:
    """Stems of a subject's content words: ``"a lighthouse keeper"`` gives ``("lighthous", "keep")``."""
    return tuple(dict.fromkeys(stem(word) for word in words(subject) if word not in _STOP_WORDS))


def on_topic(text: str, subject: str, keywords: str = "") -> bool:
    """Whether a text names its subject.

    Args:
        text: The completion.
        subject: What it has to be about: any of the content words counts, in any common form.
        keywords: Stems, separated by spaces, to be used instead of the subject's words: a word that begins with one
            of them counts.

    A subject without content words names nothing and is never on topic.
    """
    found = words(text)
    if keywords:
        return any(word.startswith(tuple(keywords.lower().split())) for word in found)
    wanted = set(subject_stems(subject))
    return any(stem(word) in wanted for word in found)
