"""Small templates in which Jinja's and Python's rules show, for golden_templates.py."""

VARIABLES = {
    "text": "Hello, World", "padded": "  a b  ", "lines": "one\ntwo\r\nthree\n", "quotes": "it's \"so\"\n\\ \t\u200b é 🦀",
    "empty": "", "zero": 0, "seven": 7, "pi": 3.14159, "big": 1e20, "small": 1.5e-7, "whole": 2.0, "yes": True, "no": False,
    "nothing": None, "numbers": [3, 1, 2], "words": ["pear", "Apple", "fig", "apple"], "nested": [[1, [2]], {"k": [True, None]}],
    "mapping": {"b": 1, "a": "x", "C": None}, "people": [
        {"name": "Ann", "age": 30, "tags": ["x"], "home": {"city": "Bern"}}, {"name": "bob", "age": 25, "home": {"city": "Rome"}},
        {"name": "Cid", "age": 30}],
    "items_key": {"items": [1, 2], "keys": "k"}, "html": "<a href='x'>&amp;</a>",
}

# Expressions are printed; what begins with "{" is a template.
PRINTED = """
none
true
[true, false, none, 1, 1.0, 'a', "it's", 'q"q']
{'a': [1, {'b': none}], 1: true, none: 2.5}
(1, 'two')
(1,)
()
nested
mapping
quotes
[quotes]
big
small
[pi, whole, 1e16, 123456789.125, 1e-5, 0.0001, -0.0]
1e15
missing
[missing]
missing ~ 'x'
missing.attribute
missing['key']
missing()
mapping.missing
mapping.missing.deeper
nothing.attribute
nothing['key']
nothing[0]
nothing[1:]
numbers.missing
numbers[10]
numbers[10].x
numbers['0']
text.missing()
text.missing
text[100]
text[0] ~ text[-1]
zero.x.y
none ~ true ~ 1.0 ~ [none]
'a' ~ 1 + 2
1 + 2 ~ 'a'
1 ~ 2 * 3
'a' + 1
'a' + none
1 + missing
missing + 1
[1] + [2]
[1] + (2,)
(1,) + (2,)
'ab' * 3
3 * 'ab'
[0] * 3
'ab' * -1
'ab' * 1.5
7 / 2
8 / 2
7 // 2
-7 // 2
7.5 // 2
-7 % 3
7 % -3
7.5 % 2
-7.5 % 2
2 ** 10
2 ** -1
2 ** 0.5
2 ** 3 ** 2
-2 ** 2
1 / 0
1 % 0
1.0 // 0
true + true
10 - 2 - 3
10 - 2 * 3
(10 - 2) * 3
+seven - -seven
-text
1 == 1.0
true == 1
'1' == 1
[1, 2] == [1, 2]
[1, 2] == (1, 2)
{'a': 1} == {'a': 1.0}
none == false
missing == none
missing == missing2
1 < 2 < 3
1 < 2 > 3
1 < 'a'
'a' < 'b'
'B' < 'a'
[1, 2] < [1, 3]
none < 1
missing < 1
'ell' in text
'x' not in text
1 in numbers
'a' in mapping
'x' in missing
'x' in nothing
1 in text
3 in (1, 2, 3)
[1] in [[1]]
not true
not missing
not not 'x'
true and 'x'
'' or 'y'
none or missing
0 and 1 / 0
1 or 1 / 0
'a' if true else 'b'
'a' if false
('a' if false) is defined
'a' if false else 'b' if false else 'c'
text[1:4]
text[::-1]
text[-3:]
text[:-3]
text[::2]
text[5:2:-1]
numbers[::-1]
numbers[1:]
numbers[:1] + numbers[1:]
numbers[-100:100]
numbers[0:3:0]
(1, 2, 3)[1:]
mapping[1:]
numbers[true]
numbers.0
nested.0.1.0
mapping.a
mapping['a']
mapping.get('zz')
mapping.get('zz', 'd')
mapping.get('C', 'd')
mapping.items()|list
mapping.keys()|list
mapping.values()|list
mapping|items|list
mapping|list
mapping|length
items_key.items|string|length > 0
items_key['items']
items_key.keys()|list
{'a': 1}.update({'b': 2})
numbers.append(4)
numbers.pop()
mapping.pop('a')
numbers.index(2)
numbers.count(3)
numbers.index(99)
text.upper()
text.lower()
text.title()
"they're bill's x-ray 3rd".title()
"they're bill's x-ray 3rd (one)"|title
'ß straße éa'.upper()
text.swapcase()
'hELLO wORLD'.capitalize()
'hELLO wORLD'|capitalize
padded.strip() ~ '|'
padded.lstrip() ~ '|'
padded.rstrip() ~ '|'
'xxaxx'.strip('x')
'abcba'.strip('ab')
'abcba'.lstrip('ba')
'a.b.c'.rstrip('c.')
padded|trim ~ '|'
'xxaxx'|trim('x')
'a,b,,c'.split(',')
'a,b,,c'.split(',', 1)
'a,b,,c'.rsplit(',', 1)
'a,b,,c'.split(',', maxsplit=2)
'  a  b c '.split()
'  a  b c '.split(none, 1)
'  a  b c '.rsplit(none, 1)
''.split()
''.split(',')
'abc'.split('')
lines.splitlines()
lines.splitlines(true)
'a-b-c'.partition('-')
'a-b-c'.rpartition('-')
'abc'.partition('-')
text.startswith('Hell')
text.startswith(('x', 'He'))
text.endswith(('x', 'ld'))
text.startswith('ello', 1)
text.startswith(['He'])
text.endswith('')
text.startswith('x', 50)
text.find('o')
text.find('o', 5)
text.rfind('o')
text.find('zz')
text.index('zz')
text.count('l')
text.count('')
text.count('l', 5)
'éa🦀b'.find('b')
text.replace('l', 'L')
text.replace('l', 'L', 1)
text.replace('', '-')
text|replace('l', 'L', 2)
'1 2'|replace(1, 2)
', '.join(words)
', '.join(numbers)
', '.join('abc')
numbers|join(', ')
numbers|join
people|join(', ', attribute='name')
[none, true, 1.5, missing]|join('|')
missing|join(',')
text.isdigit()
'123'.isdigit()
''.isdigit()
'12a'.isalnum()
'abc'.isalpha()
' \t'.isspace()
'ABC1'.isupper()
'abC'.islower()
'Ab Cd'.istitle()
'a_1'.isidentifier()
'prefix-x'.removeprefix('prefix-')
'x.txt'.removesuffix('.txt')
'7'.zfill(3) ~ '-7'.zfill(4)
'a'.center(6) ~ '|'
'ab'.center(5, '*') ~ '|'
'a'.ljust(3) ~ '|' ~ 'a'.rjust(3)
'a'|center(6) ~ '|'
'%s and %s' % ('a', 1)
'%s' % none
'%s' % true
'%s' % [1, 'a']
'%r' % 'it'
'%d items' % 3
'%d' % 3.9
'%02d:%5d|%-5d|%+d' % (7, 42, 42, 5)
'%.2f %8.3f %e %g' % (pi, pi, pi, pi)
'%5s|%-5s|%.2s' % ('ab', 'ab', 'abc')
'%x %X %o %#x' % (255, 255, 8, 255)
'%(a)s-%(b)s' % mapping
'100%% of %s' % 'x'
'%s' % ('a', 'b')
'%s %s' % 'a'
'%d' % 'a'
'%q' % 1
'%'|format(1)
'%s-%s'|format('a', 'b')
'%(x)s'|format(x=1)
'{} {}'.format('a', 1)
'{1} {0} {x}'.format('a', 1, x=none)
'{:>5}|{:<5}|{:^5}|{:*^7}'.format('a', 'b', 'c', 'd')
'{:.2f} {:5d} {:05d} {:,} {:x} {:%}'.format(pi, 42, 42, 1234567, 255, 0.25)
'{!r} {!s}'.format('a', 'b')
'{{}} {}'.format(1)
'{}'.format()
'{:.3}'.format(pi)
'{:e} {:g}'.format(123456.789, 1e10)
text|upper
none|upper
missing|upper
5|string|length
none|string
true|string
text|length
missing|length
5|length
none|length
text|first
text|last
numbers|first
numbers|last
[]|first
[]|first is defined
mapping|first
words|sort
words|sort(case_sensitive=true)
words|sort(reverse=true)
numbers|sort
[1, 'a']|sort
people|sort(attribute='age')|map(attribute='name')|list
people|sort(attribute='age,name', reverse=true)|map(attribute='name')|list
words|unique|list
words|unique(case_sensitive=true)|list
people|unique(attribute='age')|map(attribute='name')|list
numbers|min ~ numbers|max
words|min ~ words|max
[]|max
numbers|sum
people|sum(attribute='age')
numbers|sum(start=10)
['a']|sum
numbers|reverse|list
text|reverse
numbers|map('string')|join('-')
words|map('upper')|list
words|map('replace', 'p', 'b')|list
people|map(attribute='home.city')|list
people|map(attribute='home.city', default='?')|list
people|map(attribute='tags.0')|list|length
people|selectattr('home')|map(attribute='name')|list
people|selectattr('age', 'gt', 26)|map(attribute='name')|list
people|selectattr('home.city', 'equalto', 'Bern')|list|length
people|rejectattr('age', 'eq', 30)|map(attribute='name')|list
people|selectattr('tags', 'defined')|list|length
people|selectattr('name', 'in', ['Ann', 'Cid'])|list|length
numbers|select('odd')|list
numbers|reject('greaterthan', 2)|list
numbers|select|list
[0, 1, '', none]|select|list
numbers|select('nosuch')|list
numbers|map('nosuch')|list
numbers|map(attribute='a', nosuch=1)|list
(people|selectattr('age', 'gt', 99)) is true
'yes' if people|selectattr('age', 'gt', 99) else 'no'
people|selectattr('age', 'gt', 99)|length
people|groupby('age')|map('first')|list
[1, 2, 3, 4, 5]|batch(2)|list
[1, 2, 3, 4, 5]|batch(2, 0)|list
[1, 2, 3, 4, 5]|slice(2)|list
[1, 2, 3, 4, 5]|slice(3, 0)|list
mapping|dictsort
mapping|dictsort(true)
{'a': 2, 'b': 1}|dictsort(by='value')
{'a': 2, 'b': 1}|dictsort(reverse=true)
numbers|list
text|list|length
5|list
missing|default('d')
none|default('d')
none|default('d', true)
''|d('e', boolean=true)
0|default(5, true)
missing|default
'3.7'|int
'x'|int
'x'|int(9)
'0x1f'|int(base=16)
'12'|int + 1
none|int
3.99|int
true|int
missing|int
'1.5'|float
'x'|float
'1e3'|float
2|float
3.7|round
2.5|round
3.14159|round(2)
2.675|round(2)
5|round
3.2|round(method='ceil')
3.25|round(1, 'floor')
1234|round(-2)
-5|abs
(-5)|abs
-1.5|abs
'a'|abs
'a\nb\n\nc'|indent
'a\nb\n\nc'|indent(2, true)
'a\nb\n\nc'|indent('> ', true, true)
'a\nb\n'|indent(2)
html|e
html|escape|length
html|safe
'one two  three'|wordcount
'foo bar baz qux'|truncate(9)
'foo bar baz qux'|truncate(9, true)
'foo bar baz qux'|truncate(11)
'foo bar baz qux'|truncate(11, False, '...', 0)
mapping|tojson
nested|tojson
quotes|tojson
html|tojson
quotes|tojson(ensure_ascii=true)
mapping|tojson(indent=2)
nested|tojson(indent=1)
{'a': [], 'b': {}}|tojson(indent=4)
mapping|tojson(separators=(',', ':'))
mapping|tojson(sort_keys=true)
mapping|tojson(false, 4)
[1.0, 1e20, 1e-7, 0.1, 100000.0]|tojson
{1: 'a', true: 'b', none: 'c', 2.5: 'd'}|tojson
(1, 2)|tojson
missing|tojson
[missing]|tojson
range(3)|list|tojson
people|map(attribute='name')|tojson
range(3)|list
range(1, 10, 3)|list
range(5, 0, -2)|list
range(3)|length
range(1000000)
dict(a=1, b='x')
dict([('a', 1)], b=2)
dict(mapping, a='new')
namespace(a=1).a
namespace().a
missing is defined
missing is undefined
mapping.zz is defined
mapping.zz.y is defined
nothing is none
missing is none
none is defined
text is string
5 is string
numbers is sequence
text is sequence
mapping is sequence
nothing is sequence
5 is sequence
numbers is iterable
text is iterable
nothing is iterable
missing is iterable
mapping is mapping
numbers is mapping
5 is number
5.5 is number
true is number
'5' is number
5 is integer
true is integer
5.0 is float
true is boolean
1 is boolean
true is true
1 is true
false is false
none is false
3 is odd
4 is even
9 is divisibleby(3)
9 is divisibleby 3
1 is eq 1
1 is sameas true
none is sameas none
true is sameas true
2 is in numbers
2 is in [1, 3]
2 is not in [1, 3]
5 is gt 3
'abc' is lower
'ABC' is upper
range is callable
text.upper is callable
5 is callable
'upper' is filter
'nosuch' is filter
5 is nosuch
5|nosuch
nosuch(5)
text is not none and text is defined
1 is not number or false
not text is string
text is string and not text is none
'a' 'b' "c"
'tab\tnew\\n\x41\u00e9\'"'
"\q"
0x1f + 0b11 + 0o17 + 1_000
1.5e3
1,2
1, 'a',
[1, 2, ]
{'a': 1, }
{'a': 1}['a']
{'a': {'b': {'c': 1}}}.a.b.c
text | lower | replace('o', '0') | upper
(text ~ '!') | length
-numbers|first
- seven | abs
text|upper == 'HELLO, WORLD' and 1
numbers|length - 1
numbers|length > 2
text.split(', ')[1].upper()
text.split(', ')|last|lower
(numbers + [4])|sum
{}['x']
{[1]: 2}
text()
5.upper()
"a" in "abc" == true
loop
self.x
caller
raise_exception('no: ' ~ seven)
raise_exception()
mapping|attr('a')
mapping|attr('get')('a')
text|attr('upper')()
'abc'|map('upper')|join
whole|int ~ '/' ~ whole
1 if missing is defined and missing > 3 else 2
"%s" | format(none)
"a\\b" ~ 'c\nd'
'日本語'[1] ~ '日本語'|length
'\n'.join(['a', 'b'])
numbers|map('float')|list
[1, [2, [3]]]|string
'x'.join([])
[[1, 2], [3]]|sum(start=[])
['a', 'b']|join('')|upper
true|int + true
[1,2,3][1:][0]
'a'.upper().lower().title()
dict(**mapping)
dict(*[[('z', 1)]])
'{}-{}'.format(*numbers[:2])
'abc' is in 'abcd'
mapping.keys() | sort | join
none is none is none
""".strip("\n").split("\n")

BLOCKS = [
    "{% for x in numbers %}{{ x }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for x in numbers %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.length }} {% endfor %}",
    "{% for x in numbers %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }} {% endfor %}",
    "{% for k, v in mapping.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k in mapping %}{{ k }}{% endfor %}", "{% for c in 'abc' %}{{ c }}.{% endfor %}",
    "{% for x in missing %}x{% else %}none{% endfor %}", "{% for x in nothing %}x{% endfor %}", "{% for x in 5 %}x{% endfor %}",
    "{% for a, b in [(1, 2), [3, 4]] %}{{ a + b }} {% endfor %}", "{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a + b + c }}{% endfor %}",
    "{% for x in numbers if x > 1 %}{{ loop.index }}:{{ x }} {% endfor %}",
    "{% for x in numbers if x > 9 %}{{ x }}{% else %}nothing over 9{% endfor %}",
    "{% for x in range(10) %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 5 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% set x = 1 %}{% for y in numbers %}{% set x = y %}{% endfor %}{{ x }}",
    "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for y in numbers %}{% set ns.x = ns.x + y %}{% endfor %}{{ ns.x }}",
    "{% for y in numbers %}{{ z is defined }}{% set z = y %}{{ z }} {% endfor %}{{ z is defined }}",
    "{% set ns = namespace(list=[]) %}{% for y in numbers %}{% set ns.list = ns.list + [y * 2] %}{% endfor %}{{ ns.list }}",
    "{% set mapping.x = 1 %}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set a = 1, 2 %}{{ a }}", "{% set a, b = [1] %}",
    "{% set x %}a{{ 1 + 1 }}b{% endset %}{{ x }}|{{ x is string }}", "{% set x | upper %}abc{% endset %}{{ x }}",
    "{% macro m(a, b=2, *c) %}{% endmacro %}",
    "{% macro m(a, b=2) %}{{ a }}-{{ b }}{% endmacro %}{{ m(1) }} {{ m(1, 3) }} {{ m(b=5, a=4) }} {{ m() }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(z=2) }}",
    "{% macro m(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, 3, z=4) }}",
    "{% macro m(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}",
    "{% macro fact(n) %}{{ n if n < 2 else n * fact(n - 1)|int }}{% endmacro %}{{ fact(6) }}",
    "{% macro m() %}{{ seven }}{{ later }}{% endmacro %}{% set later = 'L' %}{{ m() }}",
    "{% macro m() %}{% set inner = 1 %}{% endmacro %}{{ m() }}{{ inner is defined }}",
    "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}body {{ seven }}{% endcall %}",
    "{% macro m() %}[{{ caller(1, 2) }}]{% endmacro %}{% call(a, b) m() %}{{ a + b }}{% endcall %}",
    "{% macro m() %}x{% endmacro %}{% call m() %}body{% endcall %}", "{% macro m(x) %}{{ x.y.z }}{% endmacro %}{{ m({}) }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}", "{% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q is defined }}",
    "{% filter upper %}abc {{ text }}{% endfilter %}", "{% filter replace('a', 'b')|upper %}banana{% endfilter %}",
    "{% if 0 %}a{% elif '' %}b{% elif [] %}c{% elif {} %}d{% else %}e{% endif %}", "{% if missing %}a{% elif nothing %}b{% endif %}c",
    "{% if numbers and not empty %}yes{% endif %}", "{% raw %}{{ not }} {% this %}{% endraw %}", "{%- raw -%}  {{ x }}  {%- endraw -%}  z",
    "a {# comment #} b", "a {#- comment -#} b", "{# {{ not }} {% this %} #}c", "  {# first #}\n  {# second #}\nx",
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\n  {%- if true -%}\n  b\n  {%- endif -%}\nc\n", "a\n  {%+ if true %}\n  b\n  {%+ endif %}\nc",
    "a\n  {% if true +%}\n  b\n  {% endif +%}\nc", "a  {% if true %}  b  {% endif %}  c", "{{ 'a' }}\n{{ 'b' }}\n", "{{- 'a' -}}\n  {{- ' b ' -}}  \n",
    "x\n\n{% for i in [1, 2] %}\n- {{ i }}\n{% endfor %}\n\ny\n\n", "\n\n{% set x = 1 %}\n\n{{ x }}", "\t{% if true %}\tx{% endif %}\t\n",
    "a\r\nb\rc\n{{ 'd\r\ne'|length }}", "{%- for x in numbers -%}\n  {{ x }}\n{%- endfor -%}", "{{ '{{ x }}' }}{{ '%}' }}", "{{ {'a': {'b': 1}}['a']['b'] }}",
    "{% generation %}said {{ text }}{% endgeneration %}", "{% generation %}{% set g = 1 %}{% endgeneration %}{{ g is defined }}",
    "{%- generation -%}  x  {%- endgeneration -%}  y", "{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else '(' ~ loop(x) ~ ')' }}{% endfor %}",
    "{% for x in [[1], [2]] recursive %}{{ loop.depth }}{{ loop(x) if x is sequence else x }}{% endfor %}",
    "{% for x in numbers %}{{ loop.cycle('a', 'b') }}{% endfor %}", "{% for x in [1, 1, 2] %}{{ loop.changed(x) }} {% endfor %}",
    "{% for x in numbers %}{% for y in 'ab' %}{{ loop.index }}{{ y }}{% endfor %}{{ loop.index }} {% endfor %}",
    "{% set gen = numbers|select('odd') %}{{ gen|list }}{{ gen|list }}", "{% set gen = numbers|map('string') %}{% for x in gen %}{{ x }}{{ loop.last }}{% endfor %}",
    "{% if true %}", "{% endif %}", "{% for x in numbers %}", "{% for %}", "{% if %}x{% endif %}", "{{ }}", "{{ 1 + }}", "{{ (1 }}", "{{ 'abc }}", "{{ a b }}",
    "{% unknown %}", "{% do numbers.append(1) %}", "{% break %}", "{% set %}", "{% set 1 = 2 %}", "{% set true = 1 %}", "{{ x | }}", "{{ x is }}", "{{ [1, 2 }}", "{{ {1} }}", "{{ x",
    "{% if x", "{# x", "{% raw %}x", "{{ f(a=1, 2) }}", "{{ 1 if }}", "{% macro %}{% endmacro %}", "{% else %}", "{{ a.b. }}", "{{ a[] }}", "{{ @ }}", "{{ a ! b }}",
    "{% for x in numbers %}{{ x }}{% else if %}{% endfor %}", "{% if true %}{% for x in numbers %}{% endif %}{% endfor %}",
    "{% set messages = [1, 2] %}{{ messages }}", "{% set numbers = numbers[1:] %}{{ numbers }}", "{% for x in numbers %}{% set numbers = [] %}{{ x }}{% endfor %}{{ numbers }}",
    "{% if missing is not defined %}{% set missing = 'set' %}{% endif %}{{ missing }}", "{{ loop is defined }}{% for x in [1] %}{{ loop is defined }}{% endfor %}",
    "{% set ns = namespace(mapping) %}{{ ns.a }}{{ ns['b'] }}{{ ns.zz is defined }}", "{% set ns = namespace(a=1) %}{% set ns.b = ns %}{{ ns.b.a }}",
    "{% set t = numbers %}{{ t is sameas numbers }}{{ [1] is sameas [1] }}", "{{ numbers|join(',') if numbers is iterable and numbers is not string else numbers }}",
    "{% set a = [] %}{% set a = a + ['x'] %}{% set a = a + ['y'] %}{{ a|join }}", "{% set d = dict(mapping, new=1) %}{{ d }}{{ mapping|length }}",
    "{%set x=1%}{{x}}{%if x==1%}y{%endif%}", "{{'a'}}{{-'b'-}} c", "{{ text }}\n", "\n{{ text }}\n\n", "", "\n", "plain", "{", "{ {", "}} %} #}", "a { b } c {", "{{ '#}' }}",
]

EXPRESSIONS = ["{{ " + text + " }}" for text in PRINTED] + BLOCKS
