"""Chat templates and tokenizers of the kinds that published models have, and conversations to test them.

The templates follow the documentation of each family: its special tokens, the text around a content, and its changes to one
(trim, drop, refuse, move). They are not copies: default system prompts have words of ours. The tokenizers are built in memory
from text in this file.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the settings of its model's tokenizer and generation config.

    special: tokens to add; bos, eos: of the tokenizer; ends: the ends of sequence in the generation config.
    swallow: special tokens that take the blanks behind them (rstrip).
    """

    name: str
    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    ends: tuple[str, ...]
    swallow: tuple[str, ...] = ()


_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_ALTERNATE = r"""
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant/...') }}
{%- endif %}"""
_SYSTEM = r"""
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"""
_CHATML_TURNS = r"""
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
_DEFAULT_SYSTEM = r"""
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are Qwen, a careful helper.<|im_end|>\n' }}{%- endif %}"""

_LLAMA_2 = r"""@SYSTEM@{%- for m in turns %}@ALTERNATE@
{%- if m.role == 'user' %}
    {%- set first = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' %}
    {{- bos_token + '[INST] ' + (first + m.content) | trim + ' [/INST]' }}
{%- else %}{{- ' ' + m.content | trim + ' ' + eos_token }}{%- endif %}{%- endfor %}"""

_LLAMA_3 = r"""{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

_LLAMA_3_1 = r"""{{- bos_token }}{%- if date_string is not defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}@SYSTEM@
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Knowledge ends: December 2023\nToday: ' + date_string + '\n\n' + system | trim + '<|eot_id|>' }}
{%- for m in turns %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if m.tool_calls %}{{- m.tool_calls[0].function | tojson + '<|eot_id|>' }}
    {%- else %}
        {%- if loop.first and tools %}{{- 'Functions that you may call:\n\n' }}
            {%- for t in tools %}{{- t | tojson(indent=4) + '\n\n' }}{%- endfor %}
        {%- endif %}
        {{- m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

_GEMMA_TURNS = r"""{%- for m in turns %}@ALTERNATE@
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- (system + '\n\n' if loop.first and system else '') + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
_GEMMA = r"""{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('there is no system role') }}{%- endif %}
{%- set system = '' %}{%- set turns = messages %}@GEMMA@"""

_MISTRAL_V1 = r"""{{- bos_token }}{%- for m in messages %}@ALTERNATE@
{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- else %}{{- m.content + eos_token + ' ' }}
{%- endif %}{%- endfor %}"""
_MISTRAL_V3 = r"""{{- bos_token }}@SYSTEM@{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{%- for m in turns %}@ALTERNATE@
{%- if m.role == 'user' %}
    {%- if tools and m == users[-1] %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
    {{- '[INST] ' + (system + '\n\n' if m == users[-1] and system else '') + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}{%- endfor %}"""

_QWEN_2_5 = r"""
{%- if tools %}
{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'You are Qwen, a careful helper.') }}
{{- '\n\n# Tools\n\n<tools>' }}{%- for t in tools %}{{- '\n' + t | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}
{%- else %}@DEFAULT@{%- endif %}
{%- for m in (messages[1:] if tools and messages[0].role == 'system' else messages) %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
_QWEN_3 = r"""{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- else %}
        {%- set content = m.content %}{%- set reasoning = m.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {%- set content = '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

_DEEPSEEK_V3 = r"""{{- bos_token }}@SYSTEM@{{- system }}
{%- for m in turns %}
    {%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
    {%- else %}{{- '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}"""
_DEEPSEEK_R1 = _DEEPSEEK_V3.replace(
    "'<｜Assistant｜>' + m.content +", "'<｜Assistant｜>' + m.content.split('</think>')[-1] +"
).replace("{{- '<｜Assistant｜>' }}", r"{{- '<｜Assistant｜><think>\n' }}")

_PHI_3 = r"""
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
_PHI_4 = r"""
{%- for m in messages %}{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"""
_ZEPHYR = r"""
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""

_GPT_OSS = r"""
{{- '<|start|>system<|message|>You are a language model.\nToday: ' + strftime_now('%Y-%m-%d') }}
{{- '\n\nReasoning: ' + reasoning_effort | default('medium') + '\n\n# Channels: analysis, commentary, final.<|end|>' }}@SYSTEM@
{%- if system %}{{- '<|start|>developer<|message|># Instructions\n\n' + system + '\n\n<|end|>' }}{%- endif %}
{%- for m in turns %}
    {%- if m.role == 'assistant' %}
        {%- if '<|channel|>' in m.content %}{{- raise_exception('a content must not hold channels') }}{%- endif %}
        {%- if m.thinking and loop.last %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

_COMMAND_R = r"""{{- bos_token }}@SYSTEM@
{%- if system %}{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}{%- endif %}
{%- for m in turns %}@ALTERNATE@
    {{- '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>') }}
    {{- m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"""

_GRANITE = r"""@SYSTEM@
{%- set system = system or 'Knowledge ends: April 2024.\nYou are Granite.' %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}
{%- for m in turns %}
    {{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""

_SMOLLM3 = r"""{%- set think = enable_thinking | default(true) %}@SYSTEM@
{%- if '/no_think' in system %}{%- set think = false %}{%- endif %}
{{- '<|im_start|>system\n## Metadata\n\nReasoning Mode: ' + ('/think' if think else '/no_think') }}
{{- '\n\n## Custom Instructions\n\n' + system.replace('/no_think', '').rstrip() + '\n\n<|im_end|>\n' }}
{%- for m in turns %}
    {%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- else %}{%- generation %}
        {{- '<|im_start|>assistant\n' + ('' if think else '<think>\n\n</think>\n') }}
        {{- m.content.lstrip('\n') + '<|im_end|>\n' }}
    {%- endgeneration %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('' if think else '<think>\n\n</think>\n') }}
{%- endif %}"""

_TULU = r"""
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}
    {%- else %}{{- '<|' + m.role + '|>\n' + m.content + '\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""
_OPENCHAT = r"""{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- m.content + '<|end_of_turn|>' }}
    {%- else %}{{- 'GPT4 Correct ' + m.role | title + ': ' + m.content + '<|end_of_turn|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- 'GPT4 Correct Assistant:' }}{%- endif %}"""
_VICUNA = r"""@SYSTEM@{{- bos_token + (system or 'A curious user talks with a polite assistant.') + ' ' }}
{%- for m in turns %}
    {%- if m.role == 'user' %}{{- 'USER: ' + m.content + ' ' }}
    {%- else %}{{- 'ASSISTANT: ' + m.content + eos_token }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"""
_ALPACA = r"""@SYSTEM@{{- bos_token + (system or 'Below is an instruction. Write a response to it.') + '\n\n' }}
{%- for m in turns %}
    {%- if m.role == 'user' %}{{- '### Instruction:\n' + m.content + '\n\n' }}
    {%- else %}{{- '### Response:\n' + m.content + eos_token + '\n\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '### Response:\n' }}{%- endif %}"""
_PLAIN = r"""
{%- for m in messages %}{{- m.role | title + ': ' + m.content + '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant: ' }}{%- endif %}"""
_OPENS_THINK = r"""
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and '</think>' not in m.content %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"""
_GENERATION = r"""
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' %}{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}
    {%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
_BLANK = r"""
{%- for m in messages %}{{- '<|' + m.role + '|> ' + m.content + eos_token + '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
_OPEN_END = r"""
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + ('' if loop.last else '<|im_end|>\n') }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_end|>\n<|im_start|>assistant\n' }}{%- endif %}"""

_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>")
_GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_OSS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")
_COHERE = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
           "<|CHATBOT_TOKEN|>")  # fmt: skip
_ROLES = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
_S = ("<s>", "</s>")

_PARTS = {"@GEMMA@": _GEMMA_TURNS, "@SYSTEM@": _SYSTEM, "@ALTERNATE@": _ALTERNATE, "@DEFAULT@": _DEFAULT_SYSTEM}


def _joined(spec: ChatTemplate) -> ChatTemplate:
    return replace(
        spec, template=functools.reduce(lambda text, part: text.replace(*part), _PARTS.items(), spec.template)
    )


TEMPLATES = {
    spec.name: _joined(spec)
    for spec in (
        ChatTemplate("chatml", _CHATML_TURNS, _IM, None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
        ChatTemplate("llama-2", _LLAMA_2, _S, "<s>", "</s>", ("</s>",)),
        ChatTemplate("llama-3", _LLAMA_3, _HEADERS, _HEADERS[3], _HEADERS[4], ("<|end_of_text|>", "<|eot_id|>")),
        ChatTemplate("llama-3.1", _LLAMA_3_1, _HEADERS, _HEADERS[3], "<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>")),
        ChatTemplate("gemma", _GEMMA, _GEMMA_TOKENS, "<bos>", "<eos>", ("<eos>", "<end_of_turn>")),
        ChatTemplate("gemma-3", "{{- bos_token }}@SYSTEM@@GEMMA@", _GEMMA_TOKENS, "<bos>", "<eos>",
                     ("<eos>", "<end_of_turn>")),
        ChatTemplate("mistral-v1", _MISTRAL_V1, _S, "<s>", "</s>", ("</s>",)),
        ChatTemplate("mistral-v3", _MISTRAL_V3, (*_S, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
                     "<s>", "</s>", ("</s>",)),
        ChatTemplate("qwen-2.5", _QWEN_2_5, _IM, None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
        ChatTemplate("qwen-3", _QWEN_3, _IM, None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
        ChatTemplate("deepseek-r1", _DEEPSEEK_R1, _DEEPSEEK, _DEEPSEEK[0], _DEEPSEEK[1], (_DEEPSEEK[1],)),
        ChatTemplate("deepseek-v3", _DEEPSEEK_V3, _DEEPSEEK, _DEEPSEEK[0], _DEEPSEEK[1], (_DEEPSEEK[1],)),
        ChatTemplate("phi-3", _PHI_3, (*_PHI, "<s>"), "<s>", "<|endoftext|>",
                     ("<|endoftext|>", "<|assistant|>", "<|end|>"), swallow=_PHI[:4]),
        ChatTemplate("phi-4", _PHI_4, (*_IM, "<|im_sep|>"), None, "<|im_end|>", ("<|im_end|>",)),
        ChatTemplate("zephyr", _ZEPHYR, _S, "<s>", "</s>", ("</s>",)),
        ChatTemplate("gpt-oss", _GPT_OSS, _OSS, None, "<|return|>", ("<|return|>", "<|endoftext|>", "<|call|>")),
        ChatTemplate("command-r", _COMMAND_R, _COHERE, "<BOS_TOKEN>", _COHERE[2], (_COHERE[2],)),
        ChatTemplate("granite", _GRANITE, _ROLES, None, "<|end_of_text|>", ("<|end_of_text|>",)),
        ChatTemplate("smollm2", "@DEFAULT@" + _CHATML_TURNS, _IM, None, "<|im_end|>", ("<|im_end|>",)),
        ChatTemplate("smollm3", _SMOLLM3, _IM, None, "<|im_end|>", ("<|im_end|>",)),
        ChatTemplate("olmo-2", "{{- bos_token }}" + _TULU, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>",
                     ("<|endoftext|>",)),
        ChatTemplate("tulu", _TULU, _HEADERS[3:], "<|begin_of_text|>", "<|end_of_text|>", ("<|end_of_text|>",)),
        ChatTemplate("openchat", _OPENCHAT, ("<s>", "<|end_of_turn|>"), "<s>", "<|end_of_turn|>", ("<|end_of_turn|>",)),
        ChatTemplate("vicuna", _VICUNA, _S, "<s>", "</s>", ("</s>",)),
        ChatTemplate("alpaca", _ALPACA, _S, "<s>", "</s>", ("</s>",)),
        ChatTemplate("plain", _PLAIN, _S, None, "</s>", ("</s>",)),
        ChatTemplate("opens-think", _OPENS_THINK, (*_IM, "<think>", "</think>"), None, "<|im_end|>", ("<|im_end|>",)),
        ChatTemplate("generation", _GENERATION, _IM, None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
        ChatTemplate("trims", _CHATML_TURNS.replace("m.content", "m.content.strip()"), _IM, None, "<|im_end|>",
                     ("<|im_end|>",)),
        ChatTemplate("blank", _BLANK, (*_S, "<|system|>", "<|user|>", "<|assistant|>"), "<s>", "</s>", ("</s>",)),
        ChatTemplate("open-end", _OPEN_END, _IM, None, "<|im_end|>", ("<|im_end|>",)),
    )
}  # fmt: skip


# --- tokenizers -------------------------------------------------------------------------------------------------------

_WORDS = ("the cat", "a tree", "two and two", "the answer", "some water", "rain in spring", "é à ü ñ", "user: yes")
_LINES = ("{a} is {b}.\n\n{a}", "Why does {a} do it?\nBecause {b} is it.\n", " - {a}\n  {b}\n", "{a}:\n{b}!\n\n\n")
_CORPUS = [line.format(a=a, b=b) for line in _LINES for a in _WORDS for b in _WORDS]


def _finished(base: Tokenizer, spec: ChatTemplate, *, ends_text: bool, **unknown: str) -> PreTrainedTokenizerFast:
    """Add a template's special tokens to the base; with special tokens it writes BOS (and, as BERT, an end)."""
    names = dict.fromkeys((*spec.special, *spec.ends, spec.eos, *([spec.bos] if spec.bos else []), "<pad>"))
    base.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, rstrip=name in spec.swallow) for name in names]
    )
    single = f"{spec.bos} $A" if spec.bos else "$A"
    single += f" {spec.eos}" if ends_text else ""
    written = [name for name in dict.fromkeys((spec.bos, spec.eos)) if name]
    base.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, base.token_to_id(name)) for name in written]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, bos_token=spec.bos, eos_token=spec.eos, pad_token="<pad>", **unknown
    )
    tokenizer.chat_template = spec.template
    return tokenizer


@functools.cache
def _byte_level_base(blank: bool) -> str:
    base = Tokenizer(models.BPE())
    # Line breaks join the punctuation before them, as in recent vocabularies: "?\n\n" is one token.
    words = Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+ ?|\s+")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=blank, use_regex=blank)
    base.pre_tokenizer = whole if blank else pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), whole])
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    base.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return base.to_str()


def byte_level(spec: ChatTemplate, blank: bool = False, composed: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE, as GPT-2 and Llama 3: no text is unknown, tokens span blanks and line breaks.

    blank: put a blank before a text without one, as RoBERTa. composed: write accents as one character, as Qwen.
    """
    base = Tokenizer.from_str(_byte_level_base(blank))
    if composed:
        base.normalizer = normalizers.NFC()
    return _finished(base, spec, ends_text=False)


@functools.cache
def _sentencepiece_model() -> tuple[dict[str, int], list[tuple[str, str]]]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    lines = [line.strip() for text in _CORPUS for line in text.split("\n")]
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    return {piece: i for i, piece in enumerate(pieces)}, [tuple(merge) for merge in model["merges"]]


def sentencepiece(spec: ChatTemplate, prepend_scheme: str = "always") -> PreTrainedTokenizerFast:
    """Return a BPE that writes blanks as a character, as Llama 2: a blank before the text, unknown characters as bytes.

    prepend_scheme: "always": a blank also behind each special token; "first": before the whole text only.
    """
    vocab, merges = _sentencepiece_model()
    base = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    base.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(base, spec, ends_text=False, unk_token="<unk>")


@functools.cache
def _wordpiece_base(lowercase: bool) -> str:
    base = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    base.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    base.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    base.decoder = decoders.WordPiece()
    letters = [chr(i) for i in range(33, 127)]
    base.train_from_iterator(
        [*_CORPUS, " ".join(f"{a}{a}{b}" for a in letters for b in letters)],
        trainers.WordPieceTrainer(
            vocab_size=500, special_tokens=["[UNK]"], initial_alphabet=letters, show_progress=False
        ),
    )
    return base.to_str()


def wordpiece(spec: ChatTemplate, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Return a WordPiece, as BERT: words and punctuation without the blanks between them, [UNK] for the rest."""
    return _finished(Tokenizer.from_str(_wordpiece_base(lowercase)), spec, ends_text=True, unk_token="[UNK]")


TOKENIZERS: dict[str, Any] = {
    "byte-level": byte_level,
    "byte-level-blank": functools.partial(byte_level, blank=True),
    "byte-level-composed": functools.partial(byte_level, composed=True),
    "sentencepiece": sentencepiece,
    "sentencepiece-first": functools.partial(sentencepiece, prepend_scheme="first"),
    "wordpiece": wordpiece,
    "wordpiece-lower": functools.partial(wordpiece, lowercase=True),
}


def end_ids(spec: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return all ends of sequence, of the generation config and the tokenizer."""
    return frozenset(tokenizer.convert_tokens_to_ids([*spec.ends, spec.eos]))
