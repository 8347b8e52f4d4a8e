"""The tokenizer of the checkpoints that make_fixtures.py writes, and their chat templates."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig

VOCAB = 384
MAX_POSITIONS = 1024
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
BOS, EOS, PAD, IM_START, IM_END = range(5)

TRAINING_TEXT = """
The lighthouse stood at the end of the long stone pier, and every evening the keeper climbed the
winding stairs to light the lamp. He had done this for thirty years, through summer calm and winter
storm, and he knew the sound of every wave that broke against the rocks below. When the fog came in
from the sea the great horn sounded twice a minute, and the ships that were feeling their way along
the coast would answer with their own bells and whistles. On clear nights he could count the lights
of the fishing boats, sometimes twenty or thirty of them, spread over the dark water like a second
sky. In the morning he wrote the weather in his book: the direction of the wind, the height of the
tide, the number of ships that had passed. Nobody ever read the book, but he thought that somebody
might one day want to know what the weather had been like, and then they would be glad of it.
"""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer():
    """A byte-level BPE in the layout of the Llama 3 tokenizer: 5 specials, 256 bytes, merges."""
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator([" ".join(TRAINING_TEXT.split())], trainer)
    tok.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{SPECIALS[BOS]} $A",
                pair=f"{SPECIALS[BOS]} $A {SPECIALS[BOS]}:1 $B:1",
                special_tokens=[(SPECIALS[BOS], BOS)],
            ),
        ]
    )
    assert tok.get_vocab_size() == VOCAB
    assert [tok.token_to_id(s) for s in SPECIALS] == list(range(5))
    probe = "The keeper's 1234 lamps — naïve café, 灯台 🙂\n\n  end"
    assert tok.decode(tok.encode(probe).ids) == probe
    return tok


CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# With a default system prompt and block whitespace control, as in the Qwen2.5 template.
CHATML_DEFAULT_SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# With namespace, reversed slicing and string methods, as in the Qwen3 template.
CHATML_THINKING = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string %}
        {%- set ns.found = true %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last_query_index %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Strict alternation and stripped contents, as in the Llama 2 and Mistral templates. Relies on
# trim_blocks and lstrip_blocks, with which transformers renders.
INST = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'].strip() %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
    {%- set loop_messages = messages %}
{%- endif %}
{# The system message goes into the first user turn. #}
{{- bos_token }}
{%- for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message %}
        {%- set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {%- set content = message['content'] %}
    {% endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + content.strip() + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, not ' + message['role'].upper() + '!') }}
    {%- endif %}
{%- endfor %}
"""


def chat_cases():
    user = lambda text: {"role": "user", "content": text}
    assistant = lambda text: {"role": "assistant", "content": text}
    system = lambda text: {"role": "system", "content": text}
    talks = [
        [user("Hello!")],
        [system("You keep the log of a lighthouse."), user("What was the weather?")],
        [user("One"), assistant("Two"), user("Three")],
        [
            system("  Be brief.\n"),
            user("\n  How many ships passed?  "),
            assistant("  Twenty.\n\n"),
            user("And\n\nyesterday?\t"),
        ],
        [user("Grüße, 灯台 🙂 — \"quotes\", <b>&amp;</b> {{ braces }} {% raw %}")],
        [user("Goodbye"), assistant("Bye")],
    ]
    return [(talk, prompt) for talk in talks for prompt in (True, False)]


def write_json(path, doc):
    path.write_text(json.dumps(doc, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tokenizer(path, tok, written, settings):
    tok.save(str(path / "tokenizer.json"), pretty=False)
    eos = written["eos_token_id"]
    config = {
        "added_tokens_decoder": {
            str(i): {
                "content": s,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, s in enumerate(SPECIALS)
        },
        "bos_token": SPECIALS[BOS],
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIALS[eos[0] if isinstance(eos, list) else eos],
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_POSITIONS,
        "pad_token": SPECIALS[PAD],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if settings.get("chat"):
        config["chat_template"] = settings["chat"]
    if settings.get("chat_file"):
        (path / "chat_template.jinja").write_text(settings["chat_file"])
    write_json(path / "tokenizer_config.json", config)

    generation = {"bos_token_id": BOS, "eos_token_id": eos}
    if settings.get("chat") or settings.get("chat_file"):
        generation |= {"do_sample": True, "pad_token_id": PAD, "temperature": 0.6, "top_p": 0.9}
    else:
        generation |= {"_from_model_config": True}
    generation["transformers_version"] = written["transformers_version"]
    write_json(path / "generation_config.json", generation)


def check_tokenizer(path, tok, settings):
    hf = AutoTokenizer.from_pretrained(path)
    for text in (TRAINING_TEXT, "a<|im_end|>\n1234  Über\t🙂"):
        assert hf(text)["input_ids"] == tok.encode(text).ids
    assert hf.bos_token_id == BOS and hf.pad_token_id == PAD
    template = settings.get("chat") or settings.get("chat_file")
    assert hf.chat_template == template, "chat template not read back"
    GenerationConfig.from_pretrained(path)
    if not template:
        return
    cases = [
        {
            "messages": talk,
            "add_generation_prompt": prompt,
            "text": hf.apply_chat_template(talk, add_generation_prompt=prompt, tokenize=False),
        }
        for talk, prompt in chat_cases()
    ]
    if settings.get("expected_chat"):
        write_json(path / "expected_chat.json", cases)
