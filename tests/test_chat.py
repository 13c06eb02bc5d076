"""Chat templates: the same text as transformers, and errors that say what a template refused."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from tmac_py.chat import ChatTemplate, find_template
from tmac_py.errors import TmacError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "chat.json").read_text(encoding="utf-8"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["template"])
def test_same_text_as_transformers(case):
    template = ChatTemplate(GOLDEN["templates"][case["template"]], TOKENS)
    assert template.render(case["messages"], **case["options"]) == case["text"]


def test_a_template_that_refuses_says_why():
    template = ChatTemplate(GOLDEN["templates"]["llama2_style"], TOKENS)
    with pytest.raises(TmacError, match="refuses these messages: roles must alternate"):
        template.render([*USER, *USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ missing.attribute }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__init__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ range(1000000000) | list }}",
        "{% include 'file' %}",
    ],
)
def test_a_template_that_fails_or_leaves_the_sandbox_is_one_clear_error(source):
    with pytest.raises(TmacError, match="the chat template fails on these messages"):
        ChatTemplate(source).render(USER)


def test_a_template_that_is_not_jinja_names_the_line():
    with pytest.raises(TmacError, match="not valid jinja2, line 2"):
        ChatTemplate("fine\n{% for %}")


def test_messages_are_not_changed_and_must_have_a_role():
    messages = [{"role": "user", "content": "hi"}]
    ChatTemplate("{{ messages | length }}").render(messages)
    assert messages == USER
    with pytest.raises(TmacError, match="message 1 must be a mapping"):
        ChatTemplate("x").render([*USER, {"content": "no role"}])
    with pytest.raises(TmacError, match="message 0 must be a mapping"):
        ChatTemplate("x").render(["text"])


def test_the_date_is_todays():
    before = datetime.now().strftime("%Y-%m-%d")
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(USER)
    assert text in (before, datetime.now().strftime("%Y-%m-%d"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", text)


def test_namespace_may_have_an_attribute_called_self():
    assert ChatTemplate("{% set n = namespace(self=3) %}{{ n.self }}").render(USER) == "3"


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({}, {}, None),
        ({}, {"chat_template": "t"}, "t"),
        ({"chat_template.jinja": b"file"}, {"chat_template": "t"}, "file"),
        (
            {},
            {
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "yes"},
                ]
            },
            "yes",
        ),
        ({}, {"chat_template": ""}, None),
    ],
)
def test_where_the_template_stands(files, config, expected):
    assert find_template(files, config) == expected
