"""Renders the chat templates and expressions of fixtures/templates with Jinja2, set up as Hugging Face transformers
does it, and writes what they give as golden values for the tests of dibit's own renderer.

The templates are written for these tests: each behaves as the templates of a public family of models do, in other
words. A case whose rendering fails holds the message of the failure.

    pip install jinja2
    python tools/golden_templates.py --out fixtures/templates
"""

import argparse
import json
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from template_expressions import EXPRESSIONS, VARIABLES

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a place, \"now\" or on a day.",
    "parameters": {"type": "object", "properties": {
        "place": {"type": "string", "description": "City & country, e.g. Zürich"},
        "days": {"type": "integer", "description": "Days ahead", "default": 0},
        "unit": {"type": "string", "enum": ["celsius", "kelvin"], "description": "Unit"}},
        "required": ["place"]}, "return": {"type": "array", "items": {"type": "number"}}}}
SORT = {"type": "function", "function": {
    "name": "sort", "description": "Sorts.",
    "parameters": {"type": "object", "properties": {
        "values": {"type": "array", "items": {"type": "number"}, "description": "Numbers"},
        "by": {"type": ["string", "null"], "description": "Key"},
        "options": {"type": "object", "additionalProperties": {"type": "boolean"}, "description": "Options"}},
        "required": ["values", "by"]}}}
CLOCK = {"type": "function", "function": {
    "name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}


def turns(*texts):
    """A conversation of user and assistant, the user first."""
    return [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(texts)]


def system(text):
    return [{"role": "system", "content": text}]


CALL = {"id": "abc123XYZ", "type": "function",
        "function": {"name": "get_weather", "arguments": {"place": "Zürich \"HB\"", "days": 2}}}
CONVERSATIONS = {
    "question": turns("Who are you?"),
    "system": system("Speak <b>plainly</b>.") + turns("Why is the sky blue?"),
    "turns": turns("Hi", "Hello!", "Tell me more.", "More what?", "More\n\nlines\t& 'quotes' \"here\" \\ there"),
    "system turns": system("  Be brief. detailed thinking off. ") + turns("  Hi there \n", " Hello. ", "Name a colour: 绿 🦀"),
    "answered": system("You add numbers.") + turns("1 + 1?", "2"),
    "thinking": turns("2 * 3?", "<think>\nTwo threes.\n</think>\n\n6", "And 4 * 5?", "<think>\nFour fives.\n</think>\n\n20"),
    "reasoning": turns("Hm?") + [{"role": "assistant", "content": "Yes.", "reasoning_content": "What was asked?\n"}],
    "modes": system("Be kind. /no_think") + turns("Hm?"),
    "two systems": system("First.") + system("Second.") + turns("Ok?"),
    "called": turns("Weather?") + [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "abc123XYZ", "content": "{\"degrees\": 21.5}"}],
    "called twice": system("Use tools.") + turns("Weather in two places?") + [
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sun"}, {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Sun and rain."}],
    "parts": [{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": " What is this? "}, {"type": "text", "text": "Tell."}]}],
    "null": turns("Say nothing.") + [{"role": "assistant", "content": None}],
    "twice the user": turns("One")[:1] + turns("Two")[:1],
    "stranger": turns("Hello?") + [{"role": "critic", "content": "Boo!", "mood": "bad"}],
    "empty": turns(""),
}
ARGUMENTS = {
    "tools": {"tools": [WEATHER]},
    "three tools": {"tools": [SORT, CLOCK, WEATHER]},
    "documents": {"documents": [{"title": "On tea", "text": "Tea is hot.\nOften."}, {"title": "On ice", "text": "Ice is not."}]},
    "no thinking": {"enable_thinking": False, "thinking": False},
    "thinking": {"enable_thinking": True, "thinking": True},
    "budget": {"thinking_budget": 700, "reasoning_effort": "high", "date_string": "24 Dec 2031"},
    "no budget": {"thinking_budget": 0, "document_mode": "slow", "bos_token": "<other>"},
    "bad budget": {"thinking_budget": "a lot"},
    "system tools": {"tools": [SORT], "tools_in_user_message": False, "builtin_tools": ["search", "code_interpreter"]},
    "controls": {"controls": {"citations": True, "length": "short"}, "documents": [{"title": "T", "text": "D"}]},
    "categories": {"categories": {"A": "Arms", "B": "Bribes"}, "descriptions": {"A": "weapons and such"},
                   "excluded_category_keys": ["B", "A"]},
    "python tools": {"python_tools": ["def f(x): ...", "def g(): ..."]},
}
# Which arguments go with which conversations: every template is rendered with all of these.
PAIRS = [
    ("question", "tools"), ("system", "three tools"), ("called", "tools"), ("called twice", "three tools"),
    ("system", "documents"), ("question", "no thinking"), ("thinking", "no thinking"), ("modes", "thinking"),
    ("turns", "budget"), ("question", "no budget"), ("question", "bad budget"), ("system", "system tools"),
    ("question", "controls"), ("turns", "categories"), ("system", "python tools"),
]
# Rendered without the beginning of an answer too.
UNPROMPTED = ["turns", "answered", "reasoning", "called twice", "null"]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class Generation(Extension):
    """The tag around what an assistant said, which prints its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller):
        return caller()


def environment():
    result = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def dump(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    result.filters["tojson"] = dump
    result.globals["raise_exception"] = refuse
    result.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return result


def normalized(message):
    """As transformers: without nulls, and reasoning under both names."""
    message = {name: value for name, value in message.items() if value is not None}
    if "reasoning_content" in message:
        message = {"thinking": message["reasoning_content"], **message}
    return message


def outcome(env, template, variables):
    """What a rendering gives, or the message of its error."""
    try:
        return {"text": env.from_string(template).render(**variables)}
    except Exception as error:  # Whatever Python raises in a template is a failed rendering.
        if type(error) is jinja2.exceptions.TemplateError:
            return {"refused": str(error)}
        return {"error": f"{type(error).__name__}: {error}"}


def template_cases(env, directory):
    cases = []
    for path in sorted(directory.glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        plain = [(name, None, True) for name in CONVERSATIONS] + [(name, None, False) for name in UNPROMPTED]
        for name, arguments, prompt in plain + [(name, arguments, True) for name, arguments in PAIRS]:
            variables = {"messages": [normalized(message) for message in CONVERSATIONS[name]], "tools": None,
                         "documents": None, "add_generation_prompt": prompt, **SPECIAL_TOKENS,
                         **ARGUMENTS.get(arguments, {})}
            result = outcome(env, template, variables)
            cases.append({"template": path.stem, "conversation": name, "arguments": arguments, "prompt": prompt} | result)
    return cases


def lines(name, values):
    """A list of JSON with one element a line."""
    return f'"{name}": [\n' + ",\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    env = environment()
    cases = template_cases(env, out)
    shared = {"special_tokens": SPECIAL_TOKENS, "conversations": CONVERSATIONS, "arguments": ARGUMENTS}
    head = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in shared.items())
    (out / "cases.json").write_text("{" + head + ",\n" + lines("cases", cases) + "}\n", encoding="utf-8")
    expressions = [{"template": text} | outcome(env, text, VARIABLES) for text in EXPRESSIONS]
    head = f'"variables": {json.dumps(VARIABLES, ensure_ascii=False)}'
    (out / "expressions.json").write_text("{" + head + ",\n" + lines("cases", expressions) + "}\n", encoding="utf-8")
    failed = sum("text" not in case for case in cases)
    print(f"{len(cases)} renderings, {failed} of them fail; {len(expressions)} expressions")


if __name__ == "__main__":
    main()
