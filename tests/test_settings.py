"""Settings that a command or the chosen loss would ignore are refused by name; yaml and flags give the same values."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import COMMANDS, yaml_file
from test_trainer import examples, tiny_model
from transformers import TrainingArguments

from gem.config import RankArguments, RolloutArguments, ScoreArguments, check, comparator_weights, setting
from gem.pipeline import GroupMaker
from gem.settings import UNUSED, never_used, parse
from gem.tasks import build_tokenizer

OFFLINE = "--groups groups.jsonl"
ONLINE = "--data pairs.jsonl"
EVALUATED = "--eval_data test.jsonl --eval_strategy epoch"

# Command and flags -> the setting that is refused, and a word of the reason.
IN_VAIN: list[tuple[str, str, str]] = [
    ("sft --loss dpo", "loss", "sft has one loss"),
    ("sft --beta 0.3", "beta", "sft has one loss"),
    ("sft --kl_weight 0", "kl_weight", "sft has one loss"),
    ("sft --no_taper", "taper", "sft has one loss"),
    ("sft --sft_weight 1", "sft_weight", "sft has one loss"),
    ("sft --length_norm tokens", "length_norm", "sft has one loss"),
    ("sft --auroc_gate 0.7", "auroc_gate", "evaluates nothing"),
    ("sft --stop_patience 1", "stop_patience", "evaluates nothing"),
    ("sft --logging_strategy no --stop_growth 9", "stop_growth", "the guard reads the log"),
    ("sft --eval_strategy steps", "eval_strategy", "evaluates nothing"),
    ("sft --eval_on_start", "eval_on_start", "evaluates nothing"),
    ("score --stop_patience 1", "stop_patience", "trains nothing"),
    ("score --stop_margin 0.1", "stop_margin", "trains nothing"),
    ("score --stop_growth 9", "stop_growth", "trains nothing"),
    ("score --stop_idle 9", "stop_idle", "trains nothing"),
    ("score --score_with reference", "score_with", "its own reference"),
    ("score --score_with ema", "score_with", "its own reference"),
    ("score --ema_decay 0.9", "ema_decay", "its own reference"),
    ("score --lora_rank 4", "lora_rank", "before they are trained"),
    ("score --group_size 0 --temperature 0.7", "temperature", "samples nothing"),
    ("score --group_size 0 --max_new_tokens 9", "max_new_tokens", "samples nothing"),
    ("score --group_size 0 --cot_prompt", "cot_prompt", "samples nothing"),
    ("score --filter_groups false --min_spread 0.1", "min_spread", "filter_groups is off"),
    ("eval --group_size 3", "group_size", "eval_samples"),
    ("eval --score_with reference", "score_with", "its own reference"),
    ("eval --score_with ema", "score_with", "its own reference"),
    ("eval --lora_rank 4", "lora_rank", "before they are trained"),
    ("eval --data a.jsonl --eval_data b.jsonl", "data", "eval_data is what"),
    ("eval --eval_samples 0 --temperature 0.5", "temperature", "eval_samples=0"),
    ("eval --cot_pairs", "cot_pairs", "no cot_prompt"),
    ("score --cot_pairs", "cot_pairs", "no cot_prompt"),
    (f"train {ONLINE} --cot_pairs", "cot_pairs", "no cot_prompt"),
    (f"train {ONLINE} --group_size 0 --temperature 0.5", "temperature", "samples nothing"),
    (f"train {ONLINE} --filter_groups false --min_spread 0.1", "min_spread", "filter_groups is off"),
    ("eval --eval_samples 0 --top_m 3", "top_m", "eval_samples=0"),
    (f"train {OFFLINE} --beta 0.3", "beta", "dpo, ipo and listwise_dpo"),
    (f"train {OFFLINE} --loss pro --beta 0.3", "beta", "dpo, ipo and listwise_dpo"),
    ("eval --shard 1/2", "shard", "eval writes no groups"),
    (f"train {OFFLINE} --loss dpo --kl_weight 0.3", "kl_weight", "sega and listwise_dpo"),
    (f"train {OFFLINE} --loss pro --kl_weight 0.3", "kl_weight", "sega and listwise_dpo"),
    (f"train {OFFLINE} --loss dpo --length_norm tokens", "length_norm", "it is for sega"),
    (f"train {OFFLINE} --loss listwise_dpo --no_taper", "taper", "it is for sega"),
    (f"train {OFFLINE} --loss sft --sft_weight 0.5", "sft_weight", "loss=sft"),
    (f"train {OFFLINE} --loss sft --kl_weight 0.5", "kl_weight", "loss=sft"),
    (f"train {OFFLINE} --tau 1", "tau", "rank with `gem-kernels score`"),
    (f"train {OFFLINE} --reward rank", "reward", "rank with `gem-kernels score`"),
    (f"train {OFFLINE} --filter_groups false", "filter_groups", "rank with `gem-kernels score`"),
    (f"train {ONLINE} --loss dpo --tau 1", "tau", "weights are for sega"),
    (f"train {ONLINE} --loss sft --weight_norm std", "weight_norm", "weights are for sega"),
    (f"train {OFFLINE} --group_size 3", "group_size", "in the groups file"),
    (f"train {OFFLINE} --score_with reference", "score_with", "in the groups file"),
    (f"train {OFFLINE} --score_with ema", "score_with", "in the groups file"),
    (f"train {ONLINE} --ema_decay 0.9", "ema_decay", "it is for score_with=ema"),
    (f"train {ONLINE} --score_with reference --ema_decay 0.9", "ema_decay", "it is for score_with=ema"),
    (f"train {OFFLINE} --max_length 99", "max_length", "read as it is"),
    (f"train {OFFLINE} --limit 9", "limit", "read as it is"),
    (f"train {OFFLINE} --temperature 0.5", "temperature", "no eval_data"),
    (f"train {OFFLINE} --top_m 3", "top_m", "no eval_data"),
    (f"train {OFFLINE} {EVALUATED} --eval_samples 0 --top_m 3", "top_m", "eval_samples=0"),
    (f"train {OFFLINE} --eval_limit 3", "eval_limit", "no eval_data"),
    (f"train {OFFLINE} --eval_strategy steps", "eval_strategy", "no eval_data"),
    (f"train {ONLINE} --eval_on_start", "eval_on_start", "no eval_data"),
    (f"train {ONLINE} --stop_patience 1", "stop_patience", "needs eval_strategy"),
    (f"train {ONLINE} {EVALUATED} --eval_samples 0 --stop_patience 1", "stop_patience", "needs eval_strategy"),
    (f"train {ONLINE} {EVALUATED} --stop_patience 0 --stop_margin 0.2", "stop_margin", "never stops"),
    (f"train {ONLINE} {EVALUATED} --auroc_gate 0.7", "auroc_gate", "eval_on_start"),
    (f"train {ONLINE} --logging_strategy no --stop_idle 3", "stop_idle", "the guard reads the log"),
    ("sft --world_size 8", "world_size", "a launcher starts the processes"),
    (f"train {OFFLINE} --world_size 8", "world_size", "a launcher starts the processes"),
    (f"train {ONLINE} --server http://host:8000", "server", "weights do not follow the training"),
    ("score --server_timeout 9", "server_timeout", "there is no server"),
    ("eval --server_model m", "server_model", "there is no server"),
    ("score --group_size 0 --server http://host:8000", "server", "samples nothing"),
    ("score --unlabeled p.jsonl --unlabeled_share 0.3", "unlabeled_share", "score makes each group once"),
    ("score --unlabeled_split x", "unlabeled_split", "no unlabeled prompts"),
    (f"train {ONLINE} --unlabeled_split x", "unlabeled_split", "no unlabeled prompts"),
    (f"train {ONLINE} --unlabeled_share 0.3", "unlabeled_share", "no unlabeled prompts"),
    (f"train {OFFLINE} --unlabeled p.jsonl", "unlabeled", "are in the groups file"),
    *[
        (f"train {ONLINE} --unlabeled p.jsonl --loss {loss}", "unlabeled", "only sega learns")
        for loss in ("dpo", "ipo", "pro", "listwise_dpo", "sft")
    ],
    (f"train {OFFLINE} --unlabeled_share 0.3 --loss dpo", "unlabeled_share", "only sega learns"),
]
# Settings of the rules above, with their condition not met.
NOT_IN_VAIN = [
    "sft --loss sft --cache_mib 2",
    "score --auroc_gate 0.7 --min_spread 0.1 --temperature 0.5",
    "score --group_size 0 --top_m 2",
    "score --unlabeled p.jsonl --unlabeled_split x",
    f"train {ONLINE} --unlabeled p.jsonl --unlabeled_share 0.3 --unlabeled_split x",
    f"train {OFFLINE} --unlabeled_share 1",
    "score --cot_prompt --cot_pairs",
    "eval --data a.jsonl --temperature 0.5 --top_m 2 --markers x",
    "eval --eval_data a.jsonl --eval_samples 0 --markers x",
    f"train {OFFLINE} --loss dpo --beta 0.3 --sft_weight 0.5",
    f"train {OFFLINE} --loss listwise_dpo --beta 0.3 --kl_weight 0.5",
    f"train {OFFLINE} --length_norm tokens --no_taper --kl_weight 0.5 --auroc_gate 0.7",
    f"train {OFFLINE} {EVALUATED} --max_length 99 --limit 9 --temperature 0.5 --top_m 3 --eval_limit 3",
    f"train {OFFLINE} {EVALUATED} --stop_patience 1 --stop_margin 0.2",
    f"train {ONLINE} --tau 1 --group_size 3 --score_with reference --temperature 0.5 --limit 9",
    f"train {ONLINE} --score_with ema --ema_decay 0.9",
    f"train {ONLINE} --loss pro --tau 1 --stop_idle 3 --stop_growth 9",
    f"train {OFFLINE} --stop_growth 0",
    "sft --stop_growth 9 --stop_idle 3",
    f"train {ONLINE} {EVALUATED} --eval_on_start --auroc_gate 0.7",
    "score --server http://host:8000 --server_model m --server_timeout 9 --top_p 0.9",
    "eval --server http://host:8000 --server_model m --server_timeout 9 --eval_samples 0",
    f"train {OFFLINE} --beta 0.1 --tau 0.5 --group_size 5",  # the values that hold by default
]


def parsed(line: str) -> dict[str, Any]:
    command, *flags = line.split()
    training = (TrainingArguments,) if command in ("sft", "train") else ()
    flags += ["--use_cpu"] if training else []
    instances, _ = parse(command, flags, *COMMANDS[command], *training)
    return {name: value for instance in instances for name, value in vars(instance).items()}


@pytest.mark.parametrize(("line", "name", "why"), IN_VAIN, ids=[line for line, _, _ in IN_VAIN])
def test_a_setting_without_effect_is_refused(line: str, name: str, why: str) -> None:
    command = line.split()[0]
    with pytest.raises(ValueError) as raised:
        parsed(line)
    message = str(raised.value)
    assert message.startswith(f"{name} would do nothing in `gem-kernels {command}` and must be left at ")
    assert why in message.split(": ", 1)[1]


@pytest.mark.parametrize("line", NOT_IN_VAIN)
def test_a_setting_with_effect_is_not(line: str) -> None:
    assert parsed(line)


def test_every_rule_has_a_case() -> None:
    """Every rule has a case above and names existing settings."""
    tried = {(line.split()[0], why) for line, _, why in IN_VAIN}
    for commands, names, _, why in UNUSED:
        for command in commands.split():
            assert any(command == c and word in why for c, word in tried), (command, why)
            known = {f.name for cls in (*COMMANDS[command], TrainingArguments) for f in fields(cls)}
            assert set(names.split()) <= known, names


def test_a_file_is_held_to_the_same(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "groups: groups.jsonl\nloss: dpo\nkl_weight: 0.3\n")
    with pytest.raises(ValueError, match=r"kl_weight would do nothing in `gem-kernels train` .* got 0\.3"):
        parsed(f"train --config {file}")
    assert parsed(f"train --config {file} --loss sega")["kl_weight"] == 0.3
    # A preset is not refused: it sets the settings that the command has.
    assert parsed(f"train {OFFLINE} --preset paper --loss dpo")["kl_weight"] == 0


@pytest.mark.parametrize("command", ["eval", "sft"])
def test_a_preset_without_effect_is_told(command: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parsed(command)
        assert not caplog.records
        parsed(f"{command} --preset paper")
    assert f"preset=paper changes nothing of `gem-kernels {command}`" in caplog.text


@pytest.mark.parametrize(
    ("flags", "steps", "epochs", "told"),
    [
        ("", -1, 3.0, False),
        ("--num_train_epochs 1", -1, 1.0, False),
        ("--num_train_epochs 0.5", -1, 0.5, False),
        ("--max_steps 7", 7, 3.0, False),
        ("--max_steps 7 --num_train_epochs 2", 7, 2.0, True),
    ],
)
@pytest.mark.parametrize("command", ["sft", f"train {OFFLINE}"])
def test_epochs_unless_steps_are_given(
    command: str, flags: str, steps: int, epochs: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = parsed(f"{command} {flags}")
    assert (found["max_steps"], found["num_train_epochs"]) == (steps, epochs)
    assert ("max_steps=7 counts, num_train_epochs=2 does not" in caplog.text) == told == bool(caplog.records)


@pytest.mark.parametrize("name", ["lr_scheduler_kwargs", "accelerator_config", "gradient_checkpointing_kwargs"])
def test_json_in_a_flag(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be JSON, got '{{\"a\":': "):
        parsed(f'sft --{name} {{"a":')


# --- a flag that may stand without a value ---------------------------------------------------------------------------------


@dataclass
class Asking:
    question: str = setting("", "asks", nargs="?", const="Why, 100 % of it?")
    model: str = setting("", "a model")


@pytest.mark.parametrize(
    ("flags", "text", "value"),
    [
        ([], "", ""),
        (["--question"], "", "Why, 100 % of it?"),
        (["--question", "--model", "m"], "", "Why, 100 % of it?"),
        (["--question", "How?"], "", "How?"),
        ([], "question: true", "Why, 100 % of it?"),
        ([], "question: false", ""),
        ([], "question: How?", "How?"),
        (["--question", "Who?"], "question: true", "Who?"),
        (["--question"], "question: How?", "Why, 100 % of it?"),
    ],
)
def test_a_flag_with_a_value_of_its_own(flags: list[str], text: str, value: str, tmp_path: Path) -> None:
    file = ["--config", yaml_file(tmp_path, f"model: m\n{text}\n")]
    (asking,), settings = parse("score", [*file, *flags], Asking)
    assert asking.question == settings["question"] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nseed: 1\nmodel: b", "config must hold each setting once, got model several times in "),
        ("[" * 100_000, "config must be yaml, got .*recursion"),
        ("model: {a: 1}", r"argument model: expected one value, got \{'a': 1\}"),
        ("markers: {a: 1}", r"argument markers: expected a list, got \{'a': 1\}"),
        ("tau: .inf", "tau must be a finite number, got inf"),
        ("tau: .nan", "tau must be in .*, got nan"),
        ('output: "a\\0b"', r"output must not hold a NUL character, got 'a\\x00b'"),
    ],
)
def test_a_value_that_no_setting_has(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse("score", ["--config", yaml_file(tmp_path, text)], *COMMANDS["score"])


# --- the comparators of the ranking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["score", f"train {ONLINE}"])
@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["entropy"], {"entropy": 1.0}),
        (["agreement", "entropy:2"], {"agreement": 1.0, "entropy": 2.0}),
        (["agreement:0.5"], {"agreement": 0.5}),
    ],
)
def test_comparators_by_flags_and_by_file(
    command: str, items: list[str], expected: dict[str, float], tmp_path: Path
) -> None:
    block, flow = "".join(f"\n  - {item}" for item in items), f"[{', '.join(items)}]"
    given = [f"{command} --comparators {' '.join(items)} --agreement_filter"]
    for name, value in (("block", block), ("flow", flow)):
        (tmp_path / name).mkdir()
        file = yaml_file(tmp_path / name, f"comparators: {value}\nagreement_filter: true\n")
        given.append(f"{command} --config {file}")
    for line in given:
        found = parsed(line)
        assert found["comparators"] == items and found["agreement_filter"] is True
        arguments = RankArguments(comparators=found["comparators"])
        assert list(comparator_weights(arguments).items()) == list(expected.items())
    assert parsed(command)["comparators"] == ["entropy"] and parsed(command)["agreement_filter"] is False


OF = r"comparators must be of entropy, agreement, each alone or with a weight > 0, such as agreement:0.5, got "
EACH_ONCE = "comparators must be a list of one or more, each once, got "


@pytest.mark.parametrize(
    ("comparators", "message"),
    [
        ([], EACH_ONCE + r"\[\]"),
        (["entropy", "entropy"], EACH_ONCE + r"\['entropy', 'entropy'\]"),
        (["entropy", "agreement", "entropy:2"], EACH_ONCE),
        ("entropy", EACH_ONCE + "'entropy'"),
        (None, EACH_ONCE + "None"),
        (["votes"], OF + "'votes'"),
        ([""], OF + "''"),
        ([":2"], OF + "':2'"),
        (["entropy:"], OF + "'entropy:'"),
        (["entropy:two"], OF + "'entropy:two'"),
        (["entropy:1:2"], OF + "'entropy:1:2'"),
        (["entropy:0"], OF + "'entropy:0'"),
        (["entropy:-1"], OF + "'entropy:-1'"),
        (["agreement:inf"], OF + "'agreement:inf'"),
        (["agreement:nan"], OF + "'agreement:nan'"),
        (["entropy", {"agreement": 0.5}], OF + r"\{'agreement': 0.5\}"),  # of yaml: "agreement: 0.5"
        (["entropy", None], OF + "None"),
    ],
)
def test_comparators_that_are_none(comparators: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check(RankArguments(comparators=comparators))


@pytest.mark.parametrize("command", ["score", f"train {ONLINE}"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--comparators entropy votes", OF + "'votes'"),
        ("--comparators", "expected at least one argument"),
        (
            "--comparators agreement --reward softmax",
            "reward must be bt with the comparator agreement, .* got 'softmax'",
        ),
        (
            "--comparators agreement --preset paper",
            "reward must be bt with the comparator agreement, .* got 'identity'",
        ),
    ],
)
def test_comparators_are_checked_in_every_command(command: str, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(f"{command} {flags}")


def test_hidden_flags_are_those_of_no_use(capsys: pytest.CaptureFixture[str]) -> None:
    for command, names in {"sft": {"beta", "stop_patience"}, "score": {"stop_margin"}, "eval": {"group_size"}}.items():
        assert names <= never_used(command)
        with pytest.raises(SystemExit):
            parsed(f"{command} --help")
        shown = capsys.readouterr().out
        assert not any(f"--{name}" in shown for name in never_used(command))
        assert "--debug" in shown
    assert never_used("train") == {"server", "server_model", "server_timeout"}


# --- that the settings of score act -----------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "group_size": 3, "max_new_tokens": 2, "temperature": 0.2, "top_p": 0.3,
    "top_m": 3.0, "branch_weight": 0.0, "final_weight": 0.2, "entropy_clip": 0.1, "markers": ["+"], "score_with": "reference",
    "tau": 5.0, "prior_sd": 0.1, "human_weight": 0.5, "reward": "rank", "weight_norm": "std", "min_spread": 1e3,
    "filter_groups": False, "filter_members": True, "comparators": ["entropy", "agreement:3"], "agreement_filter": True,
}  # fmt: skip


def test_settings_of_the_groups_act() -> None:
    model = tiny_model()
    other = copy.deepcopy(model)
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.6)

    def groups(name: str = "") -> str:
        classes = (RolloutArguments(max_new_tokens=6, group_size=4), ScoreArguments(top_m=1.0), RankArguments())
        for arguments in classes:
            if hasattr(arguments, name):
                setattr(arguments, name, CHANGES[name])
        torch.manual_seed(0)
        worked, short = [8, 5, 9, 6, 10, 3, 4, 10, 2], [3, 4, 9, 2]
        given = [replace(example, candidate_ids=[worked, short, short, [5, *worked]]) for example in examples(2)]
        given.append(replace(examples(1)[0], rejected_ids=[], candidate_ids=[worked, short, [3, 4, 11, 2]]))
        given.append(replace(examples(1)[0], chosen_ids=[], rejected_ids=[], candidate_ids=[short, short]))
        maker = GroupMaker(model, build_tokenizer(), *classes, reference=other)
        return json.dumps(
            [[vars(m) for m in group.members] + [group.kept] for group in maker([*examples(3), *given])], default=str
        )

    plain = groups()
    assert plain == groups()
    assert [name for name in CHANGES if groups(name) == plain] == []
