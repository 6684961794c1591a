"""Text files -> training documents: plain stories, chat turns that ask for them, and other prose.

Invariant: a document is either held out or trained on, never both. The split is by a hash of the text itself,
so duplicates across files fall on the same side and naming the files in another order changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_PER_MILLE = 30
PROMPTS = (
    "Tell me a story about {}.",
    "Tell me a short story about {}.",
    "Please tell me a story about {}.",
    "Can you tell me a story about {}?",
    "Write a story about {}.",
)
VAGUE = {"bit", "day", "end", "lot", "moment", "rest", "story", "time", "way", "while"}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is "user" or "assistant"."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


def is_held_out(text: str) -> bool:
    digest = hashlib.sha256(text[:200].encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def clean(text: str) -> str:
    for fancy, plain in (("\u2019", "'"), ("\u2018", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\r", "")):
        text = text.replace(fancy, plain)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read_stories(path: Path, min_chars: int = 200) -> list[str]:
    """Stories of one file: separated by `<|endoftext|>`, or, where none stands, by single line breaks
    (a blank line then separates the paragraphs of one story)."""
    text = path.read_text(encoding="utf-8")
    pieces = text.split(END_OF_TEXT) if END_OF_TEXT in text else re.split(r"(?<!\n)\n(?!\n)", text)
    stories = (clean(piece) for piece in pieces)
    return [s for s in stories if len(s) >= min_chars and s[0].isupper() and s[-1] in '.!?"']


def read_prose(path: Path, chars: int = 6000) -> list[str]:
    """A long text cut at paragraph ends into documents of about `chars` characters."""
    documents, paragraphs, size = [], [], 0
    for paragraph in re.split(r"\n\s*\n|\n(?= = )", path.read_text(encoding="utf-8")):
        paragraphs.append(clean(paragraph))
        size += len(paragraph)
        if size >= chars:
            documents.append("\n\n".join(p for p in paragraphs if p))
            paragraphs, size = [], 0
    return documents + (["\n\n".join(paragraphs)] if size else [])


def read_conversations(path: Path) -> list[Conversation]:
    """ShareGPT JSON (`conversations` of `from`/`value`) or Alpaca JSON lines (`instruction`, `instances`)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        pairs = [(r["instruction"] + "\n" + r["instances"][0]["input"], r["instances"][0]["output"]) for r in rows]
        return [(Turn("user", clean(q)), Turn("assistant", clean(a))) for q, a in pairs]
    roles = {"human": "user", "gpt": "assistant"}
    return [tuple(Turn(roles[t["from"]], clean(t["value"])) for t in row["conversations"]) for row in json.loads(text)]


class Prompter:
    """Writes the request that a story could answer, from the story's own nouns and names.

    Nouns are found by how words are used in the corpus itself: after an article, and then before punctuation
    (which leaves adjectives out).
    """

    def __init__(self, stories: Sequence[str]) -> None:
        after_article: Counter[str] = Counter()
        then_stop: Counter[str] = Counter()
        total: Counter[str] = Counter()
        article: dict[str, Counter[str]] = {}
        for story in stories:
            tokens = re.findall(r"[a-z]+|[.,!?]", story.lower())
            total.update(tokens)
            for left, word, right in zip(tokens, tokens[1:], tokens[2:], strict=False):
                if left in ("a", "an", "the"):
                    after_article[word] += 1
                    then_stop[word] += right in ".,!?"
                    if left != "the":
                        article.setdefault(word, Counter())[left] += 1
        self._nouns = {
            word: article[word].most_common(1)[0][0]
            for word, count in total.items()
            if count >= 8
            and word in article
            and word not in VAGUE
            and after_article[word] > 0.3 * count
            and then_stop[word] > 0.2 * after_article[word]
        }
        self._frequency = total

    def request(self, story: str, rng: random.Random) -> str:
        """A request for `story`, naming one to three of the things it is about; the rarer, the likelier."""
        counts = Counter(w for w in re.findall(r"[a-z]+", story.lower()) if w in self._nouns)
        scored = sorted(counts, key=lambda w: -counts[w] / (self._frequency[w] ** 0.5))[:5]
        things = [f"{self._nouns[w]} {w}" for w in scored]
        names = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", story))
        if names and rng.random() < 0.4:
            things.insert(0, names.most_common(1)[0][0])
        if not things:
            return "Tell me a story."
        chosen = rng.sample(things[:4], min(len(things[:4]), rng.choice((1, 1, 2, 2, 3))))
        listed = chosen[0] if len(chosen) == 1 else ", ".join(chosen[:-1]) + " and " + chosen[-1]
        return rng.choice(PROMPTS).format(listed)


def unique(texts: Iterable[str]) -> list[str]:
    """First of each text, two texts being the same when their first 200 characters are."""
    seen: dict[str, str] = {}
    for text in texts:
        seen.setdefault(text[:200], text)
    return list(seen.values())
