"""The requests of the OpenAI API as typed values. JSON is parsed here, once; nothing behind this file sees a raw dict.

A field is one of four things:
- served: a field of the structs below, with its type and range;
- refused: in UNSUPPORTED. It would change the answer and is not implemented, so anything but a value that means "not
  used" is an error that names it;
- without effect here (user, metadata, store, service_tier, priority, parallel_tool_calls, ...): ignored;
- unknown: ignored too, as clients send each other's extensions everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from engine.sampling_params import MAX_LOGPROBS, SamplingParams
from server.errors import ApiError
from server.wire import EngineInfo

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_STOP_CHARS = 1024  # of one stop string

Count = Annotated[int, Meta(ge=1, le=2**31)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
StopString = Annotated[str, Meta(max_length=MAX_STOP_CHARS)]

UNUSED: tuple[object, ...] = (None, False, [], {}, "")  # what "not used" may look like
UNSUPPORTED: dict[str, tuple[object, ...]] = {  # field: further values that change nothing
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "echo": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "logit_bias": (),
    "modalities": (["text"],),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "web_search_options": (),
    # other servers'
    "allowed_token_ids": (),
    "bad_words": (),
    "cache_salt": (),
    "chat_template": (),
    "continue_final_message": (),
    "documents": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
}


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # usage so far in every chunk (vLLM)


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and plain completions share. Ranges that SamplingParams checks are left to it."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None  # without stream: ignored
    n: Choices | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # -1 and 0: off
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling_params(self, info: EngineInfo, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The request's values, else the checkpoint's (generation_config.json), else SamplingParams' own.

        Raises RequestError.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        values = {
            "temperature": _first(self.temperature, info.temperature),
            "top_p": _first(self.top_p, info.top_p),
            "top_k": _first(self.top_k, info.top_k),
            "min_p": self.min_p,
            "repetition_penalty": _first(self.repetition_penalty, info.repetition_penalty),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
            "max_tokens": max_tokens,
            "min_tokens": self.min_tokens,
            "stop": tuple(s for s in stop if s),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens": self.skip_special_tokens,
            "logprobs": logprobs,
        }
        if values["top_k"] == -1:
            values["top_k"] = 0
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]  # of one kind, which msgspec cannot say
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt by itself. Raises ApiError where there is none, or an empty one."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len({type(prompt) for prompt in given}) > 1:
            raise ApiError("invalid_request_error", "prompt mixes strings, token ids and lists of them", "prompt")
        prompts: list[Any] = [given] if given and isinstance(given[0], int) else given
        if not prompts or not all(prompts):
            raise ApiError("invalid_request_error", "the prompt is empty", "prompt")
        if len(prompts) > MAX_PROMPTS:
            raise ApiError("invalid_request_error", f"{len(prompts)} prompts; at most {MAX_PROMPTS} go", "prompt")
        return prompts


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str = "{}"  # JSON


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the assistant made in an earlier turn."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"

    def for_template(self, argument_objects: bool, where: str) -> dict[str, Any]:
        arguments: object = self.function.arguments
        if argument_objects:
            where = f"{where}.function.arguments"
            try:
                arguments = msgspec.json.decode(self.function.arguments, type=dict)
            except msgspec.MsgspecError as error:
                raise ApiError("invalid_request_error", f"{where} is not a JSON object: {error}", where) from None
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class Message(msgspec.Struct, frozen=True):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None

    def for_template(self, index: int, argument_objects: bool) -> dict[str, Any]:
        """Plain data for the chat template: role, content and what else is given. Raises ApiError.

        `argument_objects`: whether it takes the arguments of tool calls as objects (ChatTemplate).
        """
        where = f"messages[{index}]"
        if self.function_call not in UNUSED:
            raise ApiError("invalid_request_error", f"{where}.function_call: use tool_calls", f"{where}.function_call")
        content = self.content
        if isinstance(content, list):
            if kinds := [part.type for part in content if part.type != "text"]:
                problem = f"{where}.content has a part of type {kinds[0]!r}; only text is supported"
                raise ApiError("invalid_request_error", problem, f"{where}.content")
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content or ""}
        for key, value in (("name", self.name), ("tool_call_id", self.tool_call_id)):
            if value is not None:
                message[key] = value
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            message["tool_calls"] = [
                call.for_template(argument_objects, f"{where}.tool_calls[{i}]") for i, call in calls
            ]
        return message


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


R = TypeVar("R", bound=GenerationRequest)


def parse(body: bytes, kind: type[R]) -> R:
    """The typed request. Raises ApiError naming the field that is missing, wrong or not supported."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        _refuse_unsupported(fields)
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        missing = re.search("required field `(.*)`", message)
        param = ".".join(filter(None, [path.rstrip("`").removesuffix("[...]"), missing and missing[1]])) or None
        raise ApiError("invalid_request_error", message if param is None else f"{param}: {message}", param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError("invalid_request_error", f"the body is not JSON: {error}") from None


def _refuse_unsupported(fields: dict[str, msgspec.Raw]) -> None:
    for name in UNSUPPORTED.keys() & fields.keys():
        if msgspec.json.decode(fields[name]) not in (*UNUSED, *UNSUPPORTED[name]):
            raise ApiError("invalid_request_error", f"{name} is not supported by this server", name, "unsupported")


T = TypeVar("T")


def _first(*values: T | None) -> T | None:
    return next((value for value in values if value is not None), None)
