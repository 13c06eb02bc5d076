"""Write chat.json: chat templates as transformers renders them.

    python -m venv venv && venv/bin/pip install transformers jinja2
    venv/bin/python tests/golden/make_chat.py

"smollm2" is the template of SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB); the others are
written for this test, each after a family of templates in use and what it needs of the renderer.
"""

import json
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2_style": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'].strip() + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
        "{% for message in rest %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() "
        "+ ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr_style_with_blocks": """{% for message in messages %}
    {% if message['role'] == 'user' %}
<|user|>
{{ message['content'] + eos_token }}
    {%- elif message.role == 'assistant' %}
        {% generation %}
<|assistant|>
{{ message['content'] + eos_token }}
        {% endgeneration %}
    {% else %}
        {% continue %}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
<|assistant|>
    {% endif %}
{% endfor %}
""",
    "llama3_style_with_tools": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = "today" %}{% endif %}
{%- endif %}
{%- set ns = namespace(count=0, last="") %}
{{- "<|start|>system\\n\\nDate: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {%- set ns.last = message.role %}
    {%- if 'tool_calls' in message %}
        {{- message.tool_calls[0].arguments | tojson }}
    {%- elif message.content is string %}
        {{- "<|start|>" ~ message.role ~ "\\n\\n" ~ message.content | trim ~ "<|end|>" }}
    {%- else %}
        {{- message.content | map(attribute="text") | join("|") }}
    {%- endif %}
{%- endfor %}
{{- ns.count ~ ns.last }}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant\\n\\n" }}
{%- endif %}
""",
}

USER = {"role": "user", "content": "  What is <b>1 < 2</b> & 'so' on? äöü 🙂\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": 'It is "true".'}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"name": "add", "arguments": {"b": "<ü>", "a": 1}}],
}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
TOOL = {"name": "add", "description": "Adds <a> & b", "parameters": {"type": "object"}}

CASES = [
    ("smollm2", [USER], {}),
    ("smollm2", [SYSTEM, USER, ASSISTANT, USER], {}),
    ("smollm2", [USER, ASSISTANT], {"add_generation_prompt": False}),
    ("llama2_style", [USER], {}),
    ("llama2_style", [SYSTEM, USER, ASSISTANT, USER], {}),
    ("zephyr_style_with_blocks", [USER], {}),
    ("zephyr_style_with_blocks", [SYSTEM, USER, ASSISTANT, USER], {}),
    ("zephyr_style_with_blocks", [USER, ASSISTANT], {"add_generation_prompt": False}),
    ("llama3_style_with_tools", [SYSTEM, USER], {}),
    ("llama3_style_with_tools", [USER, CALL, PARTS], {"tools": [TOOL]}),
    ("llama3_style_with_tools", [USER], {"date_string": "26 Jul 2024"}),
]


def main() -> None:
    cases = []
    for name, messages, options in CASES:
        arguments = {"add_generation_prompt": True, **options}
        texts, _ = render_jinja_template(
            [messages],
            chat_template=TEMPLATES[name],
            bos_token="<s>",
            eos_token="</s>",
            **arguments,
        )
        case = {"template": name, "messages": messages, "options": arguments, "text": texts[0]}
        cases.append(case)
    golden = {"transformers": transformers.__version__, "templates": TEMPLATES, "cases": cases}
    path = Path(__file__).with_name("chat.json")
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
