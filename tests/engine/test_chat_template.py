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
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a <city>.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def tool_chat(arguments: object) -> list[dict[str, object]]:
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain in Łódź?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"rain": true}'},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And tomorrow?"},
    ]


TOOL_CHATS = [tool_chat({"city": "Łódź", "days": 1}), tool_chat('{"city": "Łódź", "days": 1}')]


@pytest.mark.parametrize("relative", TEMPLATES or [None], ids=str)
def test_renders_as_transformers(relative):
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = shared(str(relative or "chat_templates")).read_text()
    ours = ChatTemplate(source, SPECIAL, str(relative))
    cases = [(chat, None) for chat in CHATS] + [(chat, tools) for chat in TOOL_CHATS for tools in (None, [WEATHER])]
    for chat, tools in cases:
        for generation in (True, False):
            try:
                theirs = chat_template_utils.render_jinja_template(
                    [chat], tools, chat_template=source, add_generation_prompt=generation, **SPECIAL
                )[0][0]
            except Exception as error:
                with pytest.raises(RequestError) as refusal:
                    ours.render(chat, generation, tools=tools)
                assert str(refusal.value).endswith(str(error))  # noqa: PT017 (the reference's own words)
            else:
                assert ours.render(chat, generation, tools=tools) == theirs


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, SPECIAL, "template").render(CHATS[0], True, variables)


def test_the_templates_own_words_reach_the_user():
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


CALLS = "{% for m in messages %}{% for c in m.tool_calls %}EXPRESSION{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("expression", "objects"),
    [
        ("{{ c.function.arguments | tojson }}", True),
        ("{% for name, value in c.function.arguments | items %}<{{ name }}>{% endfor %}", True),
        ("{{ '```json\n' + c.function.arguments }}", False),
        ("{{ c.function.arguments }}", False),
        ("", True),
    ],
)
def test_how_a_template_takes_the_arguments_of_calls(expression: str, objects: bool):
    template = ChatTemplate(CALLS.replace("EXPRESSION", expression), SPECIAL, "template")
    assert template.takes_argument_objects == objects


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
