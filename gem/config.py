"""Every setting of gem with its default, its meaning and the paper's symbol. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MARKERS = ("####", "Final Answer:", "\\boxed{", "</think>")
COT_PROMPT = (  # requests steps, and a marker that find_spans knows
    "Reason step by step and be brief. Finish with a last line: #### and the final answer, and nothing after it."
)
LAST_TOKENS = 8  # length of the answer without a marker or a last line, in tokens
SAMPLER_GAP = 0.1  # nats a token between the sampler's log-probs and the policy's, above which a warning comes


def setting(default: Any, help: str, **more: Any) -> Any:
    """Return a dataclass field with help text for --help; `more` is passed on to its flag (nargs, const)."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


@dataclass
class ModelArguments:
    model: str = setting(
        "", "folder, hub name or GGUF file of a language model; or a config .json, to train from scratch"
    )
    tokenizer: str | None = setting(None, "folder, hub name, GGUF file or tokenizer.json; default: the model's own")
    eos_token: str | None = setting(None, "end of sequence, for a tokenizer.json that does not name its own")
    dtype: str = setting("float32", "float32 | bfloat16 | float16: dtype of the weights")
    attn_implementation: str | None = setting(None, "sdpa | eager | flash_attention_2; flash attention trains packed")
    lora_rank: int = setting(0, "rank of LoRA adapters on every linear layer but the lm_head; 0: full fine-tuning")


@dataclass
class DataArguments:
    data: str = setting(
        "", "jsonl file, saved datasets folder or hub dataset: prompt + chosen + rejected, or completion"
    )
    data_format: str = setting("auto", "name of a format in docs/data.md, if the columns are recognised wrongly")
    split: str | None = setting(
        None, "split of a folder or hub dataset with several, such as train_prefs; default: train"
    )
    prompt_format: str = setting(
        "auto",
        "how a plain-text prompt is read: chat: as the user's turn in the chat template | text: as it is | auto: chat if "
        "the tokenizer has a template and the prompt is not rendered yet",
    )
    prompt_template: str = setting("{prompt}", "text around a plain-text prompt")
    system: str = setting("", "system message for chats without one")
    max_length: int = setting(2048, "limit on prompt + completion, in tokens")
    on_bad_row: str = setting(
        "auto",
        "what to do with unusable records: skip: leave out, count by reason | stop: end the run, list all reasons | "
        "auto: stop at invalid ones, leave out those too long and ties, keep duplicates",
    )
    limit: int = setting(0, "number of records to use, from the first; 0: all")


@dataclass
class UnlabeledArguments:
    unlabeled: str | None = setting(
        None,
        "prompts without human answers, a file, folder or hub dataset as data: groups of their own, ranked by the comparators "
        "alone; human answers in it are not read, and limit is not for it",
    )
    unlabeled_split: str | None = setting(
        None, "split of unlabeled; default: --split if unlabeled is --data, else train"
    )
    unlabeled_share: float = setting(
        0.9, "most of the training's groups that have no human pair: pairs that are too few repeat; 1: each comes once"
    )


@dataclass
class RolloutArguments:
    group_size: int = setting(
        5, "k: candidates sampled per prompt; a record with `candidates` uses its own; 0: the human pair alone"
    )
    max_new_tokens: int = setting(
        256, "limit on a candidate's tokens; one that has not ended by then counts as cut off"
    )
    temperature: float = setting(1.0, "temperature of the sampler only; entropies are of the untempered distribution")
    top_p: float = setting(
        1.0, "top-p of the sampler; below 1 the log-probs are not those of the sampling distribution"
    )
    rollout_batch_size: int = setting(
        64, "candidates generated, or asked of a server, at once; `score` writes its file so often"
    )
    stop: list[str] = setting([], "texts that also end a candidate, beside the end of sequence")
    cot_prompt: str | None = setting(
        None,
        "request for a chain of thought, appended to the user's words in the prompt of candidates; without a value: our text",
        nargs="?",
        const=COT_PROMPT,
    )
    cot_pairs: bool = setting(False, "put cot_prompt into the human pair's prompt too")
    server: str | None = setting(
        None,
        "URL of a `vllm serve` that samples from the same model, with its key in VLLM_API_KEY; without it transformers samples",
    )
    server_model: str | None = setting(None, "name of the model at the server, if it serves several")
    server_timeout: float = setting(600.0, "seconds that the server may be silent before a request is sent again")


@dataclass
class ScoreArguments:
    """Eq. 1: S = - w_final * mean H(answer) + lambda * mean of the m largest H(reasoning)."""

    top_m: float = setting(0.1, "rho: share of the reasoning tokens averaged as branch entropy; 1 or more: a count m")
    branch_weight: float = setting(1.0, "lambda: weight of the branch entropy; 0: ablation without it")
    final_weight: float = setting(1.0, "w_final: weight of the answer's entropy; 0: ablation without it")
    entropy_clip: float = setting(1.0, "entropies above this quantile of the batch are clipped to it; 1: none")
    markers: list[str] = setting(list(MARKERS), "texts that announce the final answer")
    score_with: str = setting(
        "policy",
        "policy | reference | ema: the model whose entropies score; a frozen scorer cannot game its own score, and a moving "
        "average of the policy's weights does so slowly",
    )
    ema_decay: float = setting(
        0.95,
        "share of the moving average that a training step leaves: it is decay / (1 - decay) steps behind the policy",
    )
    score_tokens: int = setting(8192, "number of tokens in one scoring batch")


@dataclass
class RankArguments:
    """Bradley-Terry posterior: abilities theta from comparators, as p_ij = sigmoid((S_i - S_j) / tau), and the human pair."""

    tau: float = setting(0.5, "tau: nats of score difference that count as one unit of log-odds")
    prior_sd: float = setting(1.0, "s: standard deviation of the prior on theta")
    human_weight: float = setting(4.0, "n_h: number of comparisons that the human pair counts as; 0: candidates only")
    reward: str = setting("bt", "f: identity | softmax | rank | bt: the function from S to the reward r of Eq. 2")
    weight_norm: str = setting("mass", "mass: w = A / max(1, sum|A|/2) | none: w = A | std: A / std(A)")
    min_spread: float = setting(1e-4, "groups whose scores differ by less than this (nats) are dropped")
    filter_groups: bool = setting(True, "drop groups whose members the ranking does not tell apart")
    filter_members: bool = setting(
        False,
        "leave copies of a text and low outliers of S out of the ranking: what is common then counts less than it is",
    )
    comparators: list[str] = setting(
        ["entropy"],
        "what compares the members: entropy: by S | agreement: by how many candidates give the same answer; with a weight, "
        "such as agreement:0.5, the number of comparisons that each pair of members counts as, 1 by default",
    )
    calibrate: bool = setting(
        True,
        "multiply each term of S, and agreement, by 2q - 1, q the share of the last 256 prompts with a human pair, and one "
        "more, whose right and wrong answers it orders rightly; with reward=bt and human_weight > 0",
    )
    agreement_filter: bool = setting(
        False, "keep a group without a human pair only if some of its candidates, but not all, give the same answer"
    )


@dataclass
class LossArguments:
    """Eq. 2: L = -(1/B) sum_q sum_i w_i log pi(a_i|q), and the guard rails around it."""

    loss: str = setting("sega", "sega | listwise_dpo | dpo | ipo | pro | sft")
    length_norm: str = setting("none", "none: log pi summed over tokens | tokens: divided by their number")
    beta: float = setting(0.1, "beta: inverse temperature of dpo, ipo and listwise_dpo")
    kl_weight: float = setting(
        0.05, "weight of the k3 estimate of KL(policy || reference) on the candidates; 0: none is computed online"
    )
    taper: bool = setting(
        True, "scale off-policy members with w < 0 by min(1, pi / pi_ref), which bounds how far they are pushed down"
    )
    sft_weight: float = setting(0.1, "weight of the mean negative log-likelihood of the human chosen answer")
    cache_mib: int = setting(1024, "logits kept between forward and backward, MiB")


@dataclass
class GuardArguments:
    auroc_gate: float = setting(0.55, "warn if S orders fewer than this share of pairs correctly")
    stop_patience: int = setting(
        3, "stop if accuracy or AUROC stays below its best for this many evaluations; 0: never"
    )
    stop_margin: float = setting(0.05, "distance below the best value that counts as a fall")
    stop_growth: float = setting(
        50.0,
        "stop if gradient norm or |loss| is above this multiple of its largest value over the first 20 logged steps, three "
        "logged steps in a row, or if one step makes the weights ten times as large; 0: never",
    )
    stop_idle: int = setting(
        20,
        "stop after this many steps in a row with nothing to learn: the gradient is 0 or, online, no group is kept or all "
        "candidates are cut off; 0: never",
    )


@dataclass
class EvalArguments:
    eval_data: str | None = setting(None, "held-out preference records; default for `eval`: --data")
    eval_split: str | None = setting(None, "split of eval_data; default: --split if eval_data is --data, else train")
    eval_limit: int = setting(200, "number of held-out records to use; 0: all")
    eval_samples: int = setting(1, "sampled completions per prompt for sampled accuracy and AUROC of S; 0: neither")


@dataclass
class GroupsArguments:
    groups: str | None = setting(None, "groups file written by `gem-kernels score`; without it, training is online")


@dataclass
class PlanArguments:
    """The launch, and the dry run that plans it. None of them changes what a run computes."""

    accelerate_config: str | None = setting(
        None, "config file of accelerate that the run is launched with; one that asks for FSDP must have launched it"
    )
    dry_run: int | None = setting(
        None,
        "check everything, print memory and work of each device, and end: for so many processes, or without a value for "
        "world_size; nothing is loaded or written",
        nargs="?",
        const=0,
    )
    world_size: int = setting(0, "processes of the dry run; 0: those of WORLD_SIZE or accelerate_config, else 1")
    shape: str | None = setting(None, "config .json of the model, for a dry run where the model is not at hand")
    longest: int = setting(
        0, "tokens of the longest sequence, for a dry run; 0: of the data, or the limit of the settings"
    )
    device_memory: float = setting(0.0, "GiB of a device, for a dry run; 0: those of this machine's GPU, or 80")


@dataclass
class OutputArguments:
    output: str | None = setting(None, "file to write")
    seed: int = setting(0, "seed of the sampler")
    shard: str = setting("0/1", "i/n: make the i-th of n parts, counted from 0; `gem-kernels merge` joins their files")
    device: str | None = setting(None, "where the model runs: cpu, cuda, cuda:1, ...; default: CUDA if available")


# `preset: paper` is Eq. 1 and 2 as printed: no human pair, no guard rails but those against faults (stop_growth, stop_idle).
# Explicit settings win over a preset.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "human_weight": 0.0,
        "reward": "identity",
        "weight_norm": "none",
        "filter_groups": False,
        "calibrate": False,
        "kl_weight": 0.0,
        "sft_weight": 0.0,
        "taper": False,
        "stop_patience": 0,
    },
}


CHOICES: dict[str, tuple[str, ...]] = {
    "prompt_format": ("auto", "chat", "text"),
    "on_bad_row": ("auto", "skip", "stop"),
    "dtype": ("float32", "bfloat16", "float16"),
    "score_with": ("policy", "reference", "ema"),
    "reward": ("identity", "softmax", "rank", "bt"),
    "weight_norm": ("mass", "none", "std"),
    "loss": ("sega", "listwise_dpo", "dpo", "ipo", "pro", "sft"),
    "length_norm": ("none", "tokens"),
}
COMPARATORS = ("entropy", "agreement")
RANGES: dict[str, tuple[float, float]] = {
    "max_length": (2, float("inf")),
    "limit": (0, float("inf")),
    "unlabeled_share": (0.01, 1),
    "group_size": (0, float("inf")),
    "max_new_tokens": (1, float("inf")),
    "temperature": (1e-6, float("inf")),
    "top_p": (1e-6, 1),
    "rollout_batch_size": (1, float("inf")),
    "server_timeout": (1e-3, 1e6),
    "top_m": (1e-9, float("inf")),
    "branch_weight": (0, float("inf")),
    "final_weight": (0, float("inf")),
    "entropy_clip": (1e-9, 1),
    "ema_decay": (0, 1),
    "score_tokens": (1, float("inf")),
    "tau": (1e-9, float("inf")),
    "prior_sd": (1e-9, float("inf")),
    "human_weight": (0, float("inf")),
    "min_spread": (0, float("inf")),
    "beta": (1e-9, float("inf")),
    "kl_weight": (0, float("inf")),
    "sft_weight": (0, float("inf")),
    "cache_mib": (1, float("inf")),
    "auroc_gate": (0, 1),
    "stop_patience": (0, float("inf")),
    "stop_margin": (0, 1),
    "stop_growth": (0, float("inf")),
    "stop_idle": (0, float("inf")),
    "eval_limit": (0, float("inf")),
    "eval_samples": (0, float("inf")),
    "lora_rank": (0, float("inf")),
    "world_size": (0, 1e6),
    "longest": (0, float("inf")),
    "device_memory": (0, 1e6),
}


def check(arguments: Any) -> None:
    """Raise ValueError for a field outside CHOICES or RANGES; the message names it, the valid values and the value."""
    for name, value in vars(arguments).items():
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
        if name == "markers" and not (
            isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)
        ):
            raise ValueError(f"{name} must be a list of texts, none of them empty, got {value!r}")
        if name == "stop" and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            raise ValueError(f"{name} must be a list of texts, none of them empty, got {value!r}")
        if name == "comparators":
            comparator_weights(arguments)
        if name == "server" and value is not None:
            check_url(name, value)
        if name == "dry_run" and value is not None and value < 0:
            raise ValueError(f"dry_run must be a number of processes, or have no value, got {value!r}")
        if name == "stop_growth" and 0 < value < 2:
            raise ValueError(f"stop_growth must be 0 (never) or at least 2, got {value!r}")
        if name in RANGES:
            low, high = RANGES[name]
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")


def calibrates(arguments: RankArguments) -> bool:
    """Return True if S is calibrated by the human pairs: the other rewards read its order or its size, not its reliability."""
    return arguments.calibrate and arguments.human_weight > 0 and arguments.reward == "bt"


def comparator_weights(arguments: RankArguments) -> dict[str, float]:
    """Return the weight of each comparator, in the order of the setting.

    Raises:
        ValueError: the list is empty, an item is not a comparator of ours with a weight that is finite and > 0, a comparator
            comes twice, or agreement is to act on a reward that reads S alone.
    """
    given, weights = arguments.comparators, dict[str, float]()
    for item in given if isinstance(given, list) else []:
        name, colon, weight = item.partition(":") if isinstance(item, str) else ("", "", "")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            weights[name] = 0.0
        if name not in COMPARATORS or not 0 < weights[name] < float("inf"):
            raise ValueError(
                f"comparators must be of {', '.join(COMPARATORS)}, each alone or with a weight > 0, such as agreement:0.5, "
                f"got {item!r}"
            )
    if not weights or len(weights) < len(given):
        raise ValueError(f"comparators must be a list of one or more, each once, got {given!r}")
    if "agreement" in weights and arguments.reward != "bt":
        raise ValueError(
            f"reward must be bt with the comparator agreement, as the others read S, got {arguments.reward!r}"
        )
    return weights


def check_url(name: str, value: str) -> None:
    """Raise ValueError for what is no http(s)://host:port, or holds what may be a secret, which the message leaves out."""
    if any(sign in "@?#" or sign.isspace() for sign in value):
        raise ValueError(f"{name} must be a URL without user, password, query and blanks; a key goes into VLLM_API_KEY")
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{name} must be a URL such as http://localhost:8000, got {value!r}")


# Our defaults where they differ from transformers': log every step (the curves are the point), keep two checkpoints.
TRAINING_DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/gem",
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,  # groups have no columns
}
