"""How the demo's training documents are made."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))

from corpus import Prompter, is_held_out, read_prose, read_stories, unique

STORY = "Once upon a time, there was a {0}. The {0} had a hat. " + "It was a good day for the {0}. " * 6


def test_stories_are_split_at_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>\n".join(STORY.format(w) for w in ("cat", "dog", "owl")), encoding="utf-8")
    assert [s.split("a ")[2][:3] for s in read_stories(path)] == ["cat", "dog", "owl"]


def test_stories_are_split_at_single_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_text(STORY.format("cat") + "\n\nThe end.\n" + STORY.format("dog") + "\n", encoding="utf-8")
    first, second = read_stories(path)
    assert first.endswith("\n\nThe end.")
    assert "dog" in second


def test_the_split_follows_the_text_alone() -> None:
    texts = [f"Story number {i}. " * 20 for i in range(2000)]
    held = [t for t in texts if is_held_out(t)]
    assert 30 <= len(held) <= 95  # about 3 %
    assert [t for t in reversed(texts) if is_held_out(t)] == held[::-1]


def test_duplicates_count_once() -> None:
    assert unique(["a" * 300, "b" * 300, "a" * 300]) == ["a" * 300, "b" * 300]


def test_prose_keeps_every_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    paragraphs = [f"Paragraph {i} " + "word " * 100 for i in range(50)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    documents = read_prose(path, chars=2000)
    assert len(documents) > 5
    assert "\n\n".join(documents).split("\n\n") == [p.strip() for p in paragraphs]


def test_requests_name_what_the_story_is_about() -> None:
    prompter = Prompter([STORY.format(w) for w in ("cat", "dog", "owl")] * 10)
    request = prompter.request(STORY.format("owl"), random.Random(0))
    assert "an owl" in request or "a hat" in request or "a owl" in request
