"""A checkpoint's chat template: messages in, the prompt text the model was trained on out.

A template is code that came with the weights, so it runs in Jinja's immutable sandbox, sees plain data only, and every
loop it makes counts against a deadline. Requests never bring templates of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, RequestError

MAX_RENDER_SECONDS = 5.0
MAX_RENDERED_CHARS = 50_000_000
MAX_REPEATED_ITEMS = 10_000_000  # of one string or list made by `*`
RESERVED_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception"})


class ChatTemplate:
    """Renders as `transformers` does: trim_blocks, lstrip_blocks, loop controls, tojson without HTML escapes.

    `special_tokens` (bos_token, eos_token, ...) are the template's variables of those names. Raises CheckpointError,
    naming `origin`, where the source is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        environment = _Environment()
        try:
            self.variables = meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"{origin}: the chat template does not parse: {error}") from None
        self._special_tokens = dict(special_tokens)

    @cached_property
    def takes_argument_objects(self) -> bool:
        """Whether the arguments of past tool calls are given as an object, or as JSON text, on which templates differ.

        Given the wrong one, a template fails, or writes Python's notation, or JSON within JSON; so both are tried.
        """
        for arguments, spoilt in (({"probe": 1}, "'probe'"), ('{"probe": 1}', '\\"probe')):
            try:
                text = self.render(_probe(arguments))
            except RequestError:
                continue
            if "probe" in text and spoilt not in text:
                return isinstance(arguments, dict)
        return True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text. `tools`: JSON schemas. `variables` reach the template only where it names them.

        Raises RequestError with the template's own words where it refuses the messages, and where it runs away.
        """
        for name in variables or {}:
            if name in RESERVED_NAMES or name in self._special_tokens:
                raise RequestError(f"chat_template_kwargs may not set {name!r}", "chat_template_kwargs")
        used = {name: value for name, value in (variables or {}).items() if name in self.variables}
        deadline = time.monotonic() + MAX_RENDER_SECONDS

        def tick() -> str:
            if time.monotonic() > deadline:
                raise jinja2.TemplateError(f"it ran for more than {MAX_RENDER_SECONDS:g} s")
            return ""

        values = {**used, **self._special_tokens, "messages": messages, "tools": tools, "documents": None}
        values |= {"add_generation_prompt": add_generation_prompt, _TICK: tick}
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(values):
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise jinja2.TemplateError(f"its output is longer than {MAX_RENDERED_CHARS} characters")
                pieces.append(piece)
        except Exception as error:  # whatever foreign code raises is the request's or the template's fault
            raise RequestError(f"the chat template refused the messages: {error}", "messages") from None
        return "".join(pieces)


_TICK = "__tick__"  # a name no template can have in good faith


def _probe(arguments: object) -> list[dict[str, Any]]:
    """A conversation with one tool call, of the shape that most templates accept."""
    call = {"id": "call00000", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    return [
        {"role": "user", "content": "probe"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "probe", "tool_call_id": "call00000", "content": "probe"},
    ]


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a deadline: each loop and macro body first calls the render's own clock."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeatable: Iterator[nodes.For | nodes.Macro] = tree.find_all((nodes.For, nodes.Macro))
        for node in repeatable:
            clock = nodes.ExprStmt(nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None))
            node.body.insert(0, clock.set_lineno(node.lineno).set_environment(self))
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        if operator == "**":
            raise jinja2.TemplateError("powers are not allowed")
        for many, times in ((left, right), (right, left)):
            if (
                isinstance(many, str | list | tuple)
                and isinstance(times, int)
                and len(many) * times > MAX_REPEATED_ITEMS
            ):
                raise jinja2.TemplateError(f"it repeats something {times} times")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
