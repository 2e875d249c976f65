"""The table of public preference formats: the columns that identify each, and how its rows become records.

    format = recognise(rows)                  # by their columns, the most specific first
    raw = format.read(rows[0])                # {"prompt": ..., "chosen": ..., "rejected": ...}, for gem.shapes

A row that names the better of two answers becomes chosen and rejected; a tie is a bad record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gem import converters as to
from gem.converters import Convert, Row, is_transcript

# Fields that mean the same in every format.
_EXTRAS = ("tools", "chat_template_kwargs", "image", "images", "audio", "audios", "video", "videos")
# Pairs of columns that rate both answers, as UltraFeedback, Argilla and distilabel name them.
_RATINGS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


@dataclass(frozen=True)
class Format:
    """A row of the table.

    name: the value of --data_format. title: the name of the data set, for the log. columns: all must be present; "a|b" is
    either. read_as: the conversion in words, for the log. convert: the conversion.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    read_as: str
    convert: Convert
    holds: Callable[[Sequence[Row]], bool] = lambda rows: True
    """a further condition on the first rows, beside their columns"""
    also: tuple[str, ...] = ()
    """optional columns that the conversion uses"""
    on_request: bool = False
    """True if the format is only chosen by name, never recognised"""

    def matches(self, rows: Sequence[Row]) -> bool:
        """True if the rows have the columns of this format and meet its condition."""
        there = columns_of(rows)
        return all(there & set(column.split("|")) for column in self.columns) and self.holds(rows)

    def read(self, row: Row) -> Row:
        """Return the row under our names: prompt, chosen, rejected, candidates, system, tools, chat_template_kwargs.

        Raises:
            BadRecord: a required field is missing or of the wrong kind, or the row is a tie.
        """
        row = {name: value for name, value in row.items() if value is not None}
        extras = {name: row[name] for name in _EXTRAS if name in row}
        system = row.get("system", row.get("system_prompt"))
        for chosen, rejected in _RATINGS:
            if to.rated_alike(row, chosen, rejected):
                raise to.tie(f"{chosen} = {rejected} = {row[chosen]}")
        return {**extras, **({} if system is None else {"system": system}), **self.convert(row)}


def columns_of(rows: Sequence[Row]) -> set[str]:
    """Return the columns in which at least one row has a value."""
    return {name for row in rows for name, value in row.items() if value is not None}


def recognise(rows: Sequence[Row], name: str = "auto") -> Format:
    """Return the format that matches the first rows of a source, or the one of that name.

    Raises:
        ValueError: an unknown name, or columns that match no format.
    """
    if name != "auto":
        named = {format.name: format for format in FORMATS}
        if name not in named:
            raise ValueError(f"data_format must be auto or one of {', '.join(named)}, got {name!r}")
        return named[name]
    if {"prompt_ids", "members"} <= columns_of(rows):
        raise ValueError("data must hold records, got a groups file of `gem-kernels score`: `train --groups` takes it")
    for format in FORMATS:
        if not format.on_request and format.matches(rows):
            return format
    raise ValueError(
        "data must have 'prompt' with 'chosen', 'rejected', 'candidates' or 'completion', or the columns of another "
        f"format of docs/data.md, got the columns {sorted(columns_of(rows))}"
    )


def left_aside(format: Format, rows: Sequence[Row]) -> list[str]:
    """Return the unused columns that would match another format: the log lists them, as the choice may be wrong."""
    used = {name for column in (*format.columns, *format.also) for name in column.split("|")}
    others = [f for f in FORMATS if not f.on_request and f.matches(rows)]
    there = columns_of(rows)
    return sorted({name for other in others for c in other.columns for name in c.split("|")} & there - used)


def _of_transcripts(rows: Sequence[Row]) -> bool:
    """True if most of the prompts, else most of the chosen answers, are transcripts."""
    texts = [row.get("prompt", row.get("chosen")) for row in rows]
    texts = [text for text in texts if text is not None]
    return 2 * sum(map(is_transcript, texts)) > len(texts)


_PKU = ("response_0", "response_1", "better_response_id", "safer_response_id")
FORMATS = (
    # Data sets with columns of their own.
    Format(
        "ultrafeedback-binarized", "UltraFeedback binarized", ("prompt", "prompt_id", "chosen", "rejected", "messages"),
        "chosen and rejected are conversations that repeat the prompt", to.standard,
    ),
    Format(
        "anthropic-hh", "Anthropic HH", ("chosen", "rejected"),
        "texts of Human and Assistant as conversations, what both begin with as the prompt", to.transcripts,
        holds=_of_transcripts,
    ),
    Format(
        "pku-saferlhf", "PKU-SafeRLHF", ("prompt", *_PKU),
        "better_response_id decides (data_format pku-saferlhf-safer: safer_response_id)",
        to.by_index("prompt", "response_0", "response_1", "better_response_id"),
    ),
    Format(
        "pku-saferlhf-safer", "PKU-SafeRLHF", ("prompt", *_PKU), "safer_response_id decides",
        to.by_index("prompt", "response_0", "response_1", "safer_response_id"), on_request=True,
    ),
    Format(
        "rewardbench", "RewardBench", ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "subset"),
        "prompt, chosen and rejected as they are", to.standard,
    ),
    Format(
        "helpsteer2", "HelpSteer2 preference", ("prompt", "response_1", "response_2", "preference_strength"),
        "preference_strength decides: below 0 for response_1, above 0 for response_2",
        to.by_strength("prompt", "response_1", "response_2", "preference_strength"),
    ),
    Format(
        "helpsteer3", "HelpSteer3 preference", ("context", "response1", "response2", "overall_preference"),
        "overall_preference decides: below 0 for response1, above 0 for response2",
        to.by_strength("context", "response1", "response2", "overall_preference"),
    ),
    Format(
        "shp", "Stanford Human Preferences", ("history", "human_ref_A", "human_ref_B", "labels"),
        "history as the prompt, labels decides: 1 for human_ref_A, 0 for human_ref_B",
        to.by_index("history", "human_ref_A", "human_ref_B", "labels", first_is=1),
    ),
    Format(
        "webgpt", "WebGPT comparisons", ("question", "answer_0", "answer_1", "score_0", "score_1"),
        "question as the prompt, the higher score decides", to.webgpt,
    ),
    Format(
        "arena", "Chatbot Arena conversations", ("conversation_a", "conversation_b", "winner"),
        "winner decides, what both conversations begin with is the prompt", to.arena,
    ),
    Format(
        "arena-columns", "Arena human preference",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        "lists of turns as conversations, winner_model_a and winner_model_b decide", to.arena_columns,
    ),
    Format(
        "nectar", "Nectar", ("prompt", "answers"),
        "the answers of best and worst rank as chosen and rejected, the others left aside", to.nectar,
    ),
    Format(
        "argilla", "Argilla preferences", ("instruction", "chosen_response", "rejected_response"),
        "instruction, chosen_response, rejected_response",
        to.renamed(prompt="instruction", chosen="chosen_response", rejected="rejected_response"),
    ),
    Format(
        "openai", "OpenAI preference", ("input", "preferred_output", "non_preferred_output"),
        "the messages of input as the prompt, preferred_output as chosen", to.openai,
    ),
    Format(
        "icliniq", "iCliniq", ("input", "answer_icliniq", "answer_chatgpt"),
        "the doctor's answer_icliniq as chosen, answer_chatgpt as rejected: the set itself prefers none",
        to.renamed(prompt="input", chosen="answer_icliniq", rejected="answer_chatgpt"),
    ),
    # Generic pairs.
    Format(
        "standard", "preference records", ("prompt", "chosen|candidates|rejected"),
        "prompt, chosen and rejected as they are", to.standard, also=("completion",),
    ),
    Format(
        "conversation-pairs", "ShareGPT preference", ("conversations|trajectory|messages", "chosen", "rejected"),
        "the conversation as the prompt", to.beside_conversation,
    ),
    Format(
        "orca-dpo", "Orca DPO pairs", ("question|input|query", "chosen", "rejected"),
        "the question as the prompt, under its system message", to.orca,
        holds=lambda rows: "instruction" not in columns_of(rows),
    ),
    Format(
        "alpaca-pairs", "Alpaca preference", ("instruction", "chosen", "rejected"),
        "instruction and input as the prompt", to.alpaca("chosen", "rejected"),
        also=("input", "context", "history"),
    ),
    Format(
        "ultrafeedback", "UltraFeedback", ("instruction", "completions"),
        "the responses of highest and lowest overall_score as chosen and rejected, the others left aside",
        to.ultrafeedback,
    ),
    Format(
        "distilabel", "distilabel ratings", ("instruction", "generations", "ratings"),
        "the generations of highest and lowest rating as chosen and rejected, the others left aside", to.rated,
    ),
    Format(
        "implicit-prompt", "preference records without a prompt", ("chosen", "rejected"),
        "what chosen and rejected begin with in common as the prompt", to.implicit,
    ),
    # Single answers.
    Format(
        "unpaired", "unpaired preference", ("prompt", "completion", "label"),
        "completions with a true label as chosen", to.labelled("label", to.standard),
    ),
    Format(
        "safe-answers", "answers judged safe or not (BeaverTails)", ("prompt", "response", "is_safe"),
        "responses with a true is_safe as chosen", to.labelled("is_safe", to.renamed(prompt="prompt", chosen="response")),
    ),
    Format(
        "labelled-answers", "answers judged good or not", ("prompt", "response", "label"),
        "responses with a true label as chosen", to.labelled("label", to.renamed(prompt="prompt", chosen="response")),
    ),
    Format(
        "unpaired-alpaca", "Alpaca unpaired preference", ("instruction", "output", "kto_tag"),
        "outputs with a true kto_tag as chosen", to.labelled("kto_tag", to.alpaca("output")),
        also=("input", "context", "history"),
    ),
    Format("prompt-completion", "prompts and completions", ("prompt", "completion"), "completion as chosen", to.standard),
    Format(
        "messages", "conversations", ("messages",),
        "the turns before the assistant's first as the prompt, the rest as chosen", to.renamed(chosen="messages"),
    ),
    Format(
        "sharegpt", "ShareGPT", ("conversations",),
        "the turns before the assistant's first as the prompt, the rest as chosen", to.renamed(chosen="conversations"),
    ),
    Format(
        "alpaca", "Alpaca", ("instruction", "output|response"),
        "instruction and input as the prompt, output as chosen", to.alpaca("output|response"),
        also=("input", "context", "history"),
    ),
    Format(
        "question-answer", "questions and answers",
        ("prompt|question|query|input", "response|answer|output"), "the answer as chosen",
        to.renamed(prompt="prompt|question|query|input", chosen="response|answer|output"),
    ),
    Format("prompt", "prompts", ("prompt",), "prompts alone", to.standard),
)  # fmt: skip
