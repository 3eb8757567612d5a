from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError, TemplateError
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from fedtune.edge.chat_template import fill_in

TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "<a> & 'b'", "name": None},
    {
        "role": "assistant",
        "content": "yes",
        "reasoning": "hm",
        "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1}}}],
    },
]
TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "int"}}}}]


def text_of(template: str, turns: Any = TURNS, **options: Any) -> str:
    options = {"tools": None, "open_answer": False, "variables": {"bos_token": "<s>"}} | options
    return fill_in(template, turns, **options)[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] }}\n{% endfor %}",
        "{% for m in messages %}\n  {% if m.role %}\n    {{- m.content | trim }}\n  {% endif %}\n{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{{ tools | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.thinking }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% set d = dict(a=1, **{'b': 2}) %}{{ d.items() | list }}{{ dict([('x', 1)]) }}",
        "{% macro show(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
        "{% for m in messages %}{{ m.name is defined }} {{ m.reasoning_content }}|{% endfor %}",
        "{{ messages[0].content[::-1] }}{{ '%s' | format(3) }}{{ messages[0].content.split('&') | join('-') }}",
        "{% if tools %}{{ tools | length }}{% endif %}{% if documents is none %}no{% endif %}{{ undefined_name }}",
        "a{% generation %}b{% endgeneration %}{% if add_generation_prompt %}<assistant>{% endif %}",
        "{% filter upper %}x{% generation %}b{% endgeneration %}{% endfilter %}{{ range(3) | list }}{{ 1 // 2 }}",
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_write_what_they_write_with_transformers(template: str, tools: Any) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), bos_token="<s>")
    options: dict[str, Any] = {"tools": tools, "chat_template": template}
    for open_answer in (False, True):
        wanted = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=open_answer, **options)
        text, marked = fill_in(template, TURNS, tools=tools, open_answer=open_answer, variables={"bos_token": "<s>"})
        assert text == wanted
        if "generation" in template:
            spans = render_jinja_template([TURNS], return_assistant_tokens_mask=True, bos_token="<s>", **options)[1]
            assert list(marked) == spans[0]


@given(st.text(), st.text())
def test_contents_pass_unchanged(content: str, other: str) -> None:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": other}]
    template = "{% for m in messages %}{{ m.content }}\x00{% endfor %}"
    assert text_of(template, turns) == f"{content}\x00{other}\x00"


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(TemplateError, match="no system turns"):
        text_of("{{ raise_exception('no system turns') }}")
    with pytest.raises(ValueError, match="at least one turn"):
        text_of("x", [])


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% set ns = namespace(__init__=1) %}",
        "{{ messages[0].update(role='x') }}",
        "{{ range(1000000) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_hostile_template_reaches_nothing(template: str) -> None:
    try:
        text = text_of(template)
    except (SecurityError, TemplateError, OverflowError, TypeError):
        return
    assert text == ""  # of what may not be read there is nothing


def test_a_template_changes_nothing_that_it_is_given() -> None:
    turns = [{"role": "user", "content": "a"}]
    with pytest.raises(SecurityError):
        text_of("{% set _ = messages[0].pop('role') %}", turns)
    assert turns == [{"role": "user", "content": "a"}]
