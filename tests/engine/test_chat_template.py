"""Chat templates render as transformers renders them; hostile ones are contained."""

from __future__ import annotations

import time

import pytest

from engine.chat_template import ChatTemplate
from engine.errors import CheckpointError, RequestError
from tests.conftest import SHARED, shared

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATES = sorted(path.relative_to(SHARED) for path in (SHARED / "chat_templates").glob("*/*.jinja"))
CHATS = [
    [{"role": "user", "content": "Hi <b>&</b> 'there' \"you\" 漢"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "2+2?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>hm</think>Hello"},
        {"role": "user", "content": "More\n"},
    ],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "assistant", "content": "first"}],
]


@pytest.mark.parametrize("relative", TEMPLATES or [None], ids=str)
def test_renders_as_transformers(relative):
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = shared(str(relative or "chat_templates")).read_text()
    ours = ChatTemplate(source, SPECIAL, str(relative))
    for chat in CHATS:
        for generation in (True, False):
            try:
                theirs = chat_template_utils.render_jinja_template(
                    [chat], chat_template=source, add_generation_prompt=generation, **SPECIAL
                )[0][0]
            except Exception:
                with pytest.raises(RequestError):
                    ours.render(chat, generation)
            else:
                assert ours.render(chat, generation) == theirs


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, SPECIAL, "template").render(CHATS[0], True, variables)


def test_the_templates_own_words_reach_the_user():
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_variables_reach_a_template_that_names_them():
    assert render("{% if enable_thinking %}yes{% endif %}", enable_thinking=True, unknown=1) == "yes"


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "raise_exception"])
def test_variables_cannot_replace_the_servers_own(name: str):
    with pytest.raises(RequestError, match=name):
        render("x", **{name: []})


def test_a_broken_template_is_refused_when_loaded():
    with pytest.raises(CheckpointError, match=r"here\.jinja"):
        ChatTemplate("{% for %}", SPECIAL, "here.jinja")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ (messages|first).__class__.__base__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 10000000000 }}",
        "{{ [1] * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ undefined.attribute }}",
        "{{ 1 / 0 }}",
    ],
)
def test_hostile_templates_are_contained(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.chat_template.MAX_RENDER_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(RequestError, match="chat template"):
        render(source)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "name", ["raise_exception.__globals__", "'%s'.__mod__", "strftime_now.__code__", "self.__dict__"]
)
def test_the_inside_of_python_is_undefined(name: str):
    assert render("{{ NAME }}{{ NAME is defined }}".replace("NAME", name)) == "False"
