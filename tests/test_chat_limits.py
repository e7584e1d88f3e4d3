"""Templates are strangers' programs: each of these would hang, crash or fill the memory, and is one
line of error. Beside them: what honest templates do is what plain jinja does."""

import sys
import threading
from typing import Any

import pytest

from gptfast.chat import ChatTemplate, Limits

MESSAGES = [{"role": "user", "content": "hi"}]
QUICK = Limits(seconds=0.1, size=100_000, total=1_000_000)
# Where a size is what ends it, on a machine however slow.
SMALL = Limits(seconds=60, size=100_000, total=1_000_000)
LONG = "{% set s = 'a' * 90000 %}"  # as long as one value may be
LOOP = "{% for i in range(100000) %}"
# ns.x grows by one step for each round
GROW = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(100) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)

TOO_LARGE = {
    "repeated text": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ (10**10 * [0]) | length }}",
    "power": "{{ 10 ** 10 ** 8 }}",
    "squares": GROW % ("3", "ns.x * ns.x"),
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent precision": "{{ '%.999999999f' % 1.5 }}",
    "percent star": "{{ '%*d' % (10000000000, 1) }}",
    "percent of a dictionary": LONG + "{{ '%(s)s%(s)s' % {'s': s} }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format width from arguments": "{{ '{:{w}}'.format(1, w=9999999999) }}",
    "format map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "format many": LONG + "{{ ('{0}' * 1000).format(s) }}",
    "center": "{{ 'a'.center(9999999999) }}",
    "center in a loop": "{% for i in [1] %}{{ 'a'.center(9999999999) }}{% endfor %}",
    "center by attr": "{{ ('a' | attr('center'))(9999999999) }}",
    "center filter": "{{ 'a' | center(9999999999) }}",
    "center mapped": "{{ ['a'] | map('center', 9999999999) | list }}",
    "center block": "{% filter center(9999999999) %}a{% endfilter %}",
    "center of safe": "{{ ('a' | safe).center(9999999999) }}",
    "center of bytes": "{{ 'a'.encode().center(9999999999) }}",
    "ljust": "{{ 'a'.ljust(9999999999) }}",
    "rjust": "{{ 'a'.rjust(9999999999) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "expandtabs": "{{ '\\t'.expandtabs(9999999999) }}",
    "to_bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "translate": LONG + "{{ s.translate({97: s}) }}",
    "replace": LONG + "{{ s.replace('a', s) }}",
    "replace nothing": LONG + "{{ s.replace('', s) }}",
    "replace filter": LONG + "{{ s | replace('a', s) }}",
    "join": LONG + "{{ s.join('b' * 1000) }}",
    "join filter": LONG + "{{ range(1000) | join(s) }}",
    "join attribute": LONG + "{% set a = {'x': s} %}{{ [a, a] | join('', attribute='x') }}",
    "concatenation": LONG + "{{ s ~ s }}",
    "doubled": GROW % ("'ab'", "ns.x + ns.x"),
    "doubled by ~": GROW % ("'ab'", "ns.x ~ ns.x"),
    "indent": "{{ ('a\\n' * 1000) | indent(1000000) }}",
    "indent by text": LONG + "{{ ('a\\n' * 1000) | indent(s) }}",
    "wordwrap": LONG + "{{ ('a ' * 1000) | wordwrap(1, wrapstring=s) }}",
    "batch": "{{ [1] | batch(9999999999, 'x') | list }}",
    "slice": "{{ [1] | slice(999999999) | list }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "json indent": "{{ [1] | tojson(indent=999999999) }}",
    "json separators": LONG + "{{ [1, 2] | tojson(separators=(s, s)) }}",
    "sum of lists": "{% set l = range(9000) | batch(1) | list %}{{ l | sum(start=[]) }}" * 9,
    "fromkeys": LONG + "{{ dict.fromkeys(range(1000), s) }}",
    "lists in lists": GROW % ("['x']", "[ns.x, ns.x]"),
    "tuples in tuples": GROW % ("('x',)", "(ns.x, ns.x)"),
    "dictionaries": GROW % ("['x']", "{'a': ns.x, 'b': ns.x}"),
    "cyclers": GROW % ("'x'", "cycler(ns.x, ns.x).items"),
    "arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}"
    "{{ varargs }}{% endif %}{% endmacro %}{{ f(60, 1) }}",
    "views": LONG + "{% set v = {'k': s}.items() %}{{ [v] * 1000 }}",
    "mappings": LONG + "{% set v = {'k': s}.items().mapping %}{{ [v] * 1000 }}",
    "held": GROW % ("[]", "ns.x + [('a' * 90000).upper()]"),
    "held slices": LONG + GROW % ("[]", "ns.x + [s[1:]]"),
    "block": LONG + "{% set x %}{% for i in range(1000) %}{{ s }}{% endfor %}{% endset %}",
    "output": LONG + LOOP + "{{ s }}{% endfor %}",
    "literal output": LOOP + "some words" + "{% endfor %}",
    "lists printed": LOOP + "{% set x %}{{ range(9000) | list }}{% endset %}{% endfor %}",
    "call block": "{% macro m() %}{{ caller() }}{% endmacro %}"
    "{% call m() %}{{ 'a' * 10**10 }}{% endcall %}",
}
TOO_LONG = {
    "loops": "{% set r = range(100000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "loops that filter": "{% set r = range(100000) %}"
    "{% for a in r %}{% for b in r if b < 0 %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "lipsum": "{{ lipsum(999999999) }}",
    "sorting": LOOP + "{% set x = range(1000) | sort(reverse=true) %}{% endfor %}",
}
TOO_DEEP = {
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "lists": GROW.replace("100", "1000") % ("[]", "[ns.x]"),
    "lazy filters": GROW.replace("100", "1000") % ("[1]", "ns.x | map('string')")
    + "{{ ns.x | list }}",
}
DEEP_SOURCE = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "negations": "{{ " + "not " * 20_000 + "1 }}",
    "blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
}


def refused(template: str, reason: str, limits: Limits = QUICK) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        ChatTemplate(template, limits).render(MESSAGES)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", TOO_LARGE)
def test_size_is_bounded(case: str) -> None:
    refused(TOO_LARGE[case], "misbehaves: it (makes|pads|raises|writes)", SMALL)


@pytest.mark.parametrize("case", TOO_LONG)
def test_time_is_bounded(case: str) -> None:
    refused(TOO_LONG[case], r"misbehaves: it runs for more than 0.1 seconds")


@pytest.mark.parametrize("case", TOO_DEEP)
def test_depth_is_bounded(case: str) -> None:
    refused(TOO_DEEP[case], "misbehaves: it (has macros|nests).* (100|800 calls) deep", Limits())


@pytest.mark.parametrize("case", DEEP_SOURCE)
def test_source_is_bounded(case: str) -> None:
    """Also where someone has raised the recursion limit, under which C would run out of stack."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        refused(DEEP_SOURCE[case], "has an error: nests expressions .* 800 calls deep", Limits())
    finally:
        sys.setrecursionlimit(before)


def test_a_megabyte_of_source() -> None:
    refused("x" * (1 << 20) + "x", "has 1,048,577 characters")


def test_a_naive_search_is_bounded() -> None:
    template = "{% set s = 'a' * 100000 %}{{ s.rfind('b' + s[1:]) }}"
    refused(template, "searches a long text", Limits(size=1_000_000))


def test_hashes_that_collide() -> None:
    """Multiples of 2**61 - 1 all hash to 0; numbers that large are not made."""
    template = GROW % ("[]", "ns.x + [i * 2305843009213693951 ** 3]")
    refused(template, "number of more than 128 bits")


def test_limits_hold_in_any_thread_and_end_with_the_run() -> None:
    """They are no signals and no state of the process: threads render beside each other, and a
    debugger's own trace function is there again."""

    def nothing(*_: Any) -> None:
        pass

    outcomes: list[str] = []

    def run() -> None:
        sys.settrace(nothing)
        try:
            refused(TOO_LONG["loops"], "0.1 seconds")
            assert ChatTemplate("{{ messages[0].content }}").render(MESSAGES) == "hi"
            outcomes.append("ok" if sys.gettrace() is nothing else "trace lost")
        finally:
            sys.settrace(None)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == ["ok"] * 4


def test_one_template_serves_many_threads() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content ~ '!' }}{% endfor %}")
    right: list[str] = []

    def run(name: str) -> None:
        for _ in range(200):
            assert template.render([{"role": "user", "content": name}] * 3) == f"{name}!" * 3
        right.append(name)

    threads = [threading.Thread(target=run, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == ["0", "1", "2", "3"]


def test_limits_grow_with_the_conversation() -> None:
    """A long conversation is the caller's own; what counts is what the template makes of it."""
    echo = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    long = [{"role": "user", "content": "a" * 50_000}] * 20
    assert ChatTemplate(echo, QUICK).render(long) == "a" * 1_000_000
    refused("{{ 'a' * 1000000 }}", "makes a text")
    deep: Any = "x"
    for _ in range(150):
        deep = [deep]
    nested = [{"role": "user", "content": deep}]
    assert ChatTemplate("{{ messages[0].content | length }}").render(nested) == "1"


# Expressions of honest templates, and each filter of jinja's that takes a text, number or list.
HONEST = """
'%s: %5.2f|%-4d|%%' % ('a', 1.5, 2)
'%(a)s %(b)03d' % {'a': 'x', 'b': 7}
'{} {a:>5} {!r:^9}'.format('z', 'y', a=1)
'{a}'.format_map({'a': 'é'})
'a' ~ 1 ~ none ~ undefined_thing ~ [1, 'b'] ~ true
[1] + [2, 3] * 2
(1, 2) + (3,)
'-' * 20 ~ 3 * 'ab' ~ 0 * [1]
2 ** 10 + 7 // 2 - 7 % 4 * 1.5
-7 % 3 ~ 2 ** -1
{'b': 1, 'a': [true, none]} | tojson
{'b': 1, 'a': ['é', '<']} | tojson(indent=2, sort_keys=true)
[1, 'x'] | tojson(separators=(',', ':'), ensure_ascii=true)
'abc'.center(9, '*') ~ 'abc'.ljust(5) ~ 'abc'.rjust(5) ~ '7'.zfill(3)
'a\\tb'.expandtabs(4) ~ 'abc'.translate({97: 'x', 98: none})
'a,b,c'.replace(',', '--') ~ 'a,b,c'.replace(',', '', 1) ~ 'abc'.replace('', '-')
'-'.join(['a', 'b']) ~ ','.join('xyz') ~ ' '.join({'k': 1})
'a b c'.rsplit(' ', 1) ~ 'a/b'.rpartition('/') ~ 'abab'.rfind('b')
[3, 1, 2][::-1] ~ 'abc'[1:] ~ (1, 2, 3)[:2]
messages[1:] ~ messages[0].content[::-1]
[{'a': 2}, {'a': 1}] | sort(attribute='a') | map(attribute='a') | join(', ')
[{'a': 2}, {'a': 1}] | join('|', attribute='a') ~ ([] | join)
[1, 2, 3] | sum ~ [{'a': 2}] | sum(attribute='a', start=5)
[[1], [2]] | sum(start=[])
[1, 2, 3, 4, 5] | batch(2, 'x') | list
[1, 2, 3, 4, 5] | slice(2) | list
[1, 1, 2] | unique | list ~ [2, 1] | reverse | list ~ 'abc' | reverse
[1, 2, 3] | select('odd') | list ~ ([1] | select('even') | first)
['a', 'b'] | map('upper') | list ~ ['a'] | map('center', 5) | list
[{'r': 'u'}, {'r': 's'}] | selectattr('r', 'equalto', 'u') | list | length
[{'r': 'u'}, {'x': 's'}] | rejectattr('r', 'defined') | list
[{'r': 'u', 'n': 1}, {'r': 's', 'n': 2}] | groupby('r') | list
{'b': 1, 'a': 2} | dictsort ~ {'b': 1} | items | list ~ {'a': 1}.items() | list
'x' if [] | map('upper') else 'y'
'some words here' | wordwrap(6) | title | indent(3, true)
'some words' | truncate(6) ~ 'a' | center(5) ~ 'abc' | first ~ 'abc' | last
' a ' | trim | capitalize ~ 'ab' | replace('a', 'b') ~ 'A' | lower
2.567 | round(1) ~ 2.5 | round(method='floor') ~ '7' | int ~ '1.5' | float ~ -3 | abs
[3, 1] | min ~ [3, 1] | max ~ 'abc' | length ~ 'abc' | list ~ 'a b' | wordcount
'<a> & "b"' | e ~ ('<i>' | safe) ~ ('<b>x</b>' | striptags) ~ ('a b/é' | urlencode)
'%s-%s' | format('a', 1) ~ 12345 | filesizeformat ~ none | default('d', true)
[1, 'a'] | pprint ~ {'class': 'x'} | xmlattr ~ 'see www.example.org' | urlize
range(3) | list ~ range(2, 9, 3) | list ~ dict(a=1) ~ (namespace(a=2).a)
'a' in 'abc' and 'role' in messages[0] and messages[0].role is string
messages[0].get('missing', 'no') ~ messages[0]['content'].startswith('h')
"""


@pytest.mark.parametrize("expression", HONEST.strip().splitlines())
def test_honest_expressions_are_jinjas_own(expression: str) -> None:
    oracle = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    template = f"{{{{ {expression} }}}}"
    (wanted,), _ = oracle.render_jinja_template([messages], chat_template=template)
    assert ChatTemplate(template).render(messages) == wanted
