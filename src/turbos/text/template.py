"""The Jinja twin of the renderer: what a checkpoint carries so that other programs render chats as `chat.py` does.

For messages that spell no special token it renders what the renderer renders, token for token, and it raises for those
that do, because a program that tokenises text as a whole cannot keep them apart; it also raises where the renderer
refuses a conversation. It takes `tools`, `enable_thinking`, `reasoning_effort` and `thinking` as transformers, vLLM,
SGLang and llama-server pass them. Arguments of calls must be objects (vLLM, SGLang and llama-server parse their text).

Which parsers read what a model writes in this layout:

| program | tool calls | reasoning |
|---|---|---|
| vLLM | `--tool-call-parser hermes` | `--reasoning-parser qwen3` |
| SGLang | `--tool-call-parser qwen25` | `--reasoning-parser qwen3` |
| llama-server | `--jinja`: found from this template | `--reasoning-format auto` |

vLLM's parser takes a turn without any tag for reasoning, so send `enable_thinking` true or false there.

>>> "<|assistant|>" in chat_template(["<think>", "</think>"])
True
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from turbos.text.messages import FOLLOWS, ROLES
from turbos.text.thinking import EFFORTS

OPENING = """\
{%- set specials = SPECIALS -%}
{%- set follows = FOLLOWS -%}
{%- set efforts = EFFORTS -%}
{%- macro free(text, place) -%}
    {%- if text is not string -%}
        {{- raise_exception(place ~ ': text is wanted') -}}
    {%- endif -%}
    {%- if MARK in text -%}
        {%- for special in specials -%}
            {%- if special in text -%}
                {{- raise_exception(place ~ ': the text spells the special token ' ~ special) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- text -}}
{%- endmacro -%}
{%- set ns = namespace(previous='start', calls=0, mode='', switch='') -%}
"""

TOOLS = """\
{%- if tools -%}
    {{- '<|tool|>' -}}
    {%- for tool in tools -%}
        {{- '' if loop.first else '\\n' -}}
        {{- free(tool | tojson, 'tools') -}}
    {%- endfor -%}
    {{- '<|end|>' -}}
{%- endif -%}
"""

MESSAGES = """\
{%- for message in messages -%}
    {%- set place = 'message ' ~ loop.index0 -%}
    {%- set content = message.content if message.content is defined and message.content is not none else '' -%}
    {%- if message.role not in follows[ns.previous] -%}
        {{- raise_exception(place ~ ', role: ' ~ message.role ~ ' cannot come after ' ~ ns.previous) -}}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}
        {%- set thinking = none -%}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none -%}
            {%- set thinking = message.reasoning_content -%}
        {%- elif message.reasoning is defined and message.reasoning is not none -%}
            {%- set thinking = message.reasoning -%}
        {%- elif message.thinking is defined and message.thinking is not none -%}
            {%- set thinking = message.thinking -%}
        {%- endif -%}
        {%- set calls = message.tool_calls if message.tool_calls is defined and message.tool_calls else [] -%}
        {%- if not content and not calls and thinking is none -%}
            {{- raise_exception(place ~ ', content: an assistant turn needs content, thinking or a call') -}}
        {%- endif -%}
        {{- '<|assistant|>' -}}
        {%- if thinking is not none -%}
            {{- '<think>' ~ free(thinking, place ~ ', thinking') ~ '</think>' -}}
        {%- endif -%}
        {{- free(content, place ~ ', content') -}}
        {%- for call in calls -%}
            {%- set function = call.function if call.function is defined else call -%}
            {%- if function.arguments is not mapping -%}
                {{- raise_exception(place ~ ', tool_calls: arguments must be an object') -}}
            {%- endif -%}
            {{- '<tool_call>\\n{"name": ' ~ free(function.name | tojson, place ~ ', tool_calls') -}}
            {{- ', "arguments": ' ~ free(function.arguments | tojson, place ~ ', tool_calls') ~ '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|end|>' -}}
        {%- set ns.calls = calls | length -%}
    {%- elif message.role == 'tool' -%}
        {%- if ns.calls < 1 -%}
            {{- raise_exception(place ~ ', role: a result without a call that it answers') -}}
        {%- endif -%}
        {{- '<|tool|><tool_response>' ~ free(content, place ~ ', content') ~ '</tool_response><|end|>' -}}
        {%- set ns.calls = ns.calls - 1 -%}
    {%- else -%}
        {%- if not content -%}
            {{- raise_exception(place ~ ', content: a ' ~ message.role ~ ' turn must say something') -}}
        {%- endif -%}
        {{- '<|' ~ message.role ~ '|>' ~ free(content, place ~ ', content') ~ '<|end|>' -}}
        {%- set words = '\\n' ~ content.strip(' \\n') -%}
        {%- if words.endswith(' /no_think') or words.endswith('\\n/no_think') -%}
            {%- set ns.switch = 'off' -%}
        {%- elif words.endswith(' /think') or words.endswith('\\n/think') -%}
            {%- set ns.switch = 'on' -%}
        {%- endif -%}
    {%- endif -%}
    {%- set ns.previous = message.role -%}
{%- endfor -%}
"""

PROMPT = """\
{%- if add_generation_prompt -%}
    {%- if ns.previous not in ['user', 'tool'] -%}
        {{- raise_exception('the assistant cannot be asked to answer after ' ~ ns.previous) -}}
    {%- endif -%}
    {%- if thinking is defined and thinking is not none -%}
        {%- if thinking is boolean -%}
            {%- set ns.mode = 'on' if thinking else 'off' -%}
        {%- elif thinking[7:] | int > 0 and thinking == 'budget ' ~ (thinking[7:] | int) -%}
            {%- set ns.mode = 'on' -%}
        {%- elif thinking in ['auto', 'on', 'off'] -%}
            {%- set ns.mode = thinking -%}
        {%- else -%}
            {{- raise_exception('thinking must be auto, on or off, or budget N') -}}
        {%- endif -%}
    {%- elif reasoning_effort is defined and reasoning_effort is not none -%}
        {%- if reasoning_effort not in efforts -%}
            {{- raise_exception('unknown reasoning_effort ' ~ reasoning_effort) -}}
        {%- endif -%}
        {%- set ns.mode = efforts[reasoning_effort] -%}
    {%- elif enable_thinking is defined and enable_thinking is false -%}
        {%- set ns.mode = 'off' -%}
    {%- elif ns.switch -%}
        {%- set ns.mode = ns.switch -%}
    {%- elif enable_thinking is defined and enable_thinking is true -%}
        {%- set ns.mode = 'on' -%}
    {%- endif -%}
    {{- '<|assistant|>' -}}
    {%- if ns.mode == 'on' -%}
        {{- '<think>' -}}
    {%- elif ns.mode == 'off' -%}
        {{- '<think></think>' -}}
    {%- endif -%}
{%- endif -%}
"""


def chat_template(specials: Sequence[str]) -> str:
    """The template for a tokenizer whose special tokens are `specials`: their spelling is refused in any text."""
    follows = {role: list(FOLLOWS[role]) for role in ("start", *ROLES)}
    efforts = {effort: "off" if mode == "off" else "on" for effort, mode in EFFORTS.items()}
    values = {"SPECIALS": list(specials), "FOLLOWS": follows, "EFFORTS": efforts}
    # Most texts have none of the specials' first letter, where they share one: a search for each is saved.
    letters = {name[:1] for name in specials}
    opening = OPENING.replace("MARK", json.dumps(letters.pop() if len(letters) == 1 else ""))
    for name, value in values.items():
        opening = opening.replace(f"= {name} ", f"= {json.dumps(value)} ")
    return opening + TOOLS + MESSAGES + PROMPT
