"""What requests may ask for in OpenAI's interface and the engine does not do, and what is said of wrong requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from photon_train.errors import PhotonError

_TOOLS = "tools are not served here (vLLM serves them)"
_STRUCTURE = "structured output is not served here (vLLM serves it)"
# Fields -> the values that ask for nothing, and what is said of any other. Clients send these values unasked.
_NEUTRAL: dict[str, tuple[Sequence[Any], str]] = {
    "response_format": ([{"type": "text"}], _STRUCTURE),
    "tools": ([[]], _TOOLS),
    "tool_choice": (["none"], _TOOLS),
    "functions": ([[]], _TOOLS),
    "function_call": (["none"], _TOOLS),
    "suffix": ([""], "the engine has no such setting"),
    "store": ([False], "answers are not stored"),
    "modalities": ([["text"]], "answers are text"),
    "service_tier": (["auto", "default"], "there is one tier"),
}
# Notes of the client to itself or to OpenAI, which change no answer.
_NOTES = ("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "user")
# Fields whose parts and types pydantic tells one by one, in its own words.
_UNIONS = {
    "prompt": "must be a text, a list of texts, a list of token ids or a list of such lists",
    "content": "must be a text, or a list of parts of type text",
    "stop": "must be a text or a list of texts",
    "logit_bias": "must be an object of token ids and numbers",
}
_PLAIN = {"missing": "is required", "extra_forbidden": "is no field that the server knows"}


def without_neutral(given: Mapping[str, Any]) -> dict[str, Any]:
    """A request without the fields that ask for nothing.

    Raises:
        PhotonError: naming a field that asks for what the engine does not do.
    """
    for name, (neutral, why) in _NEUTRAL.items():
        if name in given and not any(value == given[name] and type(value) in _alike(given[name]) for value in neutral):
            raise PhotonError(f"{name}: {why}: leave it out")
    return {key: value for key, value in given.items() if key not in _NEUTRAL and key not in _NOTES}


def _alike(value: Any) -> tuple[type, ...]:
    """Types that are the same in JSON: true is no number, but 0.0 is 0."""
    return (bool,) if isinstance(value, bool) else (int, float) if isinstance(value, int | float) else (type(value),)


def describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """What pydantic found wrong, in one plain line, and the field; of several errors the first, or one of ours."""
    error = next((one for one in errors if one["type"] == "value_error"), errors[0])
    if error["type"] == "json_invalid":
        return f"the body is no JSON: {error['ctx']['error']} at character {error['loc'][-1]}", None
    place: list[str] = []
    for part in error["loc"]:
        if part == "body":
            continue
        place.append(str(part))
        if part in _UNIONS:  # what follows is pydantic's name of the type that it tried
            break
    field = ".".join(place)
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        if isinstance(error["ctx"]["error"], PhotonError):  # it names the field itself
            return message, message.partition(":")[0]
    elif place and place[-1] in _UNIONS and error["type"] not in _PLAIN:
        message = _UNIONS[place[-1]]
    else:
        message = _PLAIN.get(error["type"], error["msg"])
    if not field and error["type"] == "missing":
        return "the request has no body: send JSON", None
    return (f"{field}: {message}" if field else f"the request: {message}"), field or None
