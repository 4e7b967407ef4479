"""A chat template with generation tags and conversations, shared by the tests."""

from __future__ import annotations

import json
from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TOOL_TEMPLATE = "{% if tools %}<tools>{{ tools | tojson }}{% endif %}" + TEMPLATE.replace(
    "{% generation %}{{ message['content'] + ",
    "{% generation %}{% for call in message.tool_calls %}<call>{{ call | tojson }}{% endfor %}"
    "{{ message['content'] | default('') + ",
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}


def conversation(*texts: str) -> list[dict[str, str]]:
    """The user speaks first."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def chat_file(path: Path, count: int = 30) -> Path:
    """JSONL with `count` conversations of two rounds."""
    rows = [conversation(f"What is {i}?", f"A number, {i}.", "Sure?", "Yes " * (i % 5 + 1)) for i in range(count)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path
