"""Is an approximate backward of linear_group_loss worth its place? How few vocabulary columns do, how wrong, how fast.

    python benchmarks/drop_mass.py --data gsm8k_train.jsonl --tokenizer tokenizer.json --demo_model warm-start \
        --demo_data test.jsonl --work scratch --out drop_mass.json --plot docs/drop_mass.png
    python benchmarks/drop_mass.py --replot drop_mass.json --plot docs/drop_mass.png

C is the set of columns that enter the two gradient GEMMs of a group; `drop_mass` bounds the probability that any of its tokens
has outside C. First a small Llama is trained; a killed run goes on where it was. The second command draws, and prints the
tables of docs/drop_mass.md. N tokens of a group, D hidden size, V vocabulary, k sequences of a group, M drop masses.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gem_kernels import LogitTransform, sega_loss
from gem_kernels.streaming import LogitGradient, OnlineStats, Transform, ranges
from gem_kernels.tiles import CHUNKED
from gem_kernels.types import Upstream

HELD_OUT, MAX_TOKENS = 256, 200  # rows at the end of the data; of a completion
BATCH, BUCKET = 16, 320  # sequences a step; sequences sorted by length before they are cut into batches
RATE, WARM_STEPS = 1.5e-3, 100
CHECKPOINTS = (0.25, 0.5, 1.0)  # of the training time
MODEL: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4}
MODEL |= {"num_attention_heads": 6, "num_key_value_heads": 6}
MODEL |= {"max_position_embeddings": 512, "tie_word_embeddings": True}

GROUPS, SIDE_GROUPS = 16, 8  # prompts; of what stands beside the main result
SIZES = (2, 5, 8, 16)  # sequences of a group, the smaller being the first of the larger
DROP_MASSES, DECISIVE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-3
SHARPENED = 0.5  # the temperature that stands for a model of lower entropy
FINAL, SHARP = "end of the training, on-policy", f"the same, sharpened: temperature {SHARPENED:g}"
ENTROPY_BINS = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 12.0)

ROUNDS, TIMED_GROUPS = 5, 3
BLOCK = 1024  # columns that the approximate backward takes in at a time
SHAPES = ((1024, 384, 50277), (1024, 512, 128256))  # N, D, V of the synthetic times
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)  # of the vocabulary in C


class Text(NamedTuple):
    prompt: list[int]
    completion: list[int]


# --- a model to measure on -----------------------------------------------------------------------------------------------


def read_texts(data: Path, tokenizer: Any) -> list[Text]:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").split("\n") if line.strip()]
    prompts = tokenizer([row["prompt"] + "\n" for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows])["input_ids"]
    return [Text(p, [*c, tokenizer.eos_token_id][:MAX_TOKENS]) for p, c in zip(prompts, completions, strict=True)]


def completion_states(model: Any, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Last hidden states (N, D) that predict the completions' tokens, and these tokens (N,)."""
    longest = max(len(t.prompt) + len(t.completion) for t in texts)
    # Padding on the right is behind every token that counts, and attention is causal: no mask.
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    counts = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, t in enumerate(texts):
        end = len(t.prompt) + len(t.completion)
        ids[row, :end] = torch.tensor(t.prompt + t.completion)
        counts[row, len(t.prompt) : end] = True
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    return hidden[counts[:, 1:]], ids[counts]


def mean_loss(model: Any, texts: Sequence[Text]) -> Tensor:
    """Mean negative log-probability of the completions' tokens."""
    hidden, targets = completion_states(model, texts)
    n = targets.shape[0]
    return sega_loss(hidden, model.lm_head.weight, targets, torch.tensor([0, n]), torch.tensor([1 / n])).loss


def batches(texts: list[Text], seed: int) -> Iterator[list[Text]]:
    rng = random.Random(seed)
    while True:
        order = rng.sample(texts, len(texts))
        for start in range(0, len(order), BUCKET):
            bucket = sorted(order[start : start + BUCKET], key=lambda t: len(t.prompt) + len(t.completion))
            cut = [bucket[i : i + BATCH] for i in range(0, len(bucket), BATCH)]
            yield from rng.sample(cut, len(cut))


def train(texts: list[Text], tokenizer: Any, work: Path, seconds: float) -> None:
    """A small Llama for so long; leaves CHECKPOINTS and train.json in `work`. A killed run goes on from its last state."""
    if (work / "train.json").exists():
        return
    torch.manual_seed(0)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **MODEL, **special))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    step, tokens, spent, log, losses = 0, 0, 0.0, [], []
    if (work / "state.pt").exists():
        saved = torch.load(work / "state.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, tokens, spent, log = (saved[key] for key in ("step", "tokens", "spent", "log"))
    held_out, source = texts[-HELD_OUT:], batches(texts[:-HELD_OUT], seed=step)
    torch.set_float32_matmul_precision("medium")  # bf16 products inside fp32 GEMMs, twice as fast; for training only
    bar = tqdm(total=1.0, initial=spent / seconds, desc="training", mininterval=5)
    while spent < seconds:
        start, before = time.perf_counter(), spent / seconds
        # The schedule follows the clock: a shared machine makes the run poorer, not unfinished.
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_STEPS) * (0.02 + 0.98 * (1 - before))
        batch = next(source)
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + sum(len(t.completion) for t in batch)
        losses.append(float(loss.detach()))
        spent += time.perf_counter() - start
        after = min(1.0, spent / seconds)
        bar.update(after - bar.n)
        if int(8 * before) == int(8 * after):
            continue
        with torch.no_grad():
            held = statistics.fmean(float(mean_loss(model, held_out[rows])) for rows in ranges(HELD_OUT, BATCH))
        at = {"share": after, "step": step, "tokens": tokens, "train_loss": statistics.fmean(losses[-100:])}
        log.append(at | {"held_out_loss": held})
        for share in CHECKPOINTS:
            if before < share <= after:
                model.save_pretrained(work / f"checkpoint-{round(100 * share)}")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "tokens": tokens}
        torch.save(state | {"spent": spent, "log": log}, work / "state.tmp")
        (work / "state.tmp").replace(work / "state.pt")
    torch.set_float32_matmul_precision("highest")
    about = {"minutes": seconds / 60, "parameters": model.num_parameters(), "model": MODEL, "log": log}
    (work / "train.json").write_text(json.dumps(about))


def sample(model: Any, prompts: Sequence[list[int]], eos: int, temperature: float) -> list[list[Text]]:
    """The largest of SIZES completions of each prompt, from the whole distribution."""
    torch.manual_seed(1)
    groups = []
    for prompt in tqdm(prompts, desc="sampling"):
        ids = torch.tensor([prompt]).repeat(max(SIZES), 1)
        most = min(MAX_TOKENS, model.config.max_position_embeddings - len(prompt))
        how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0, "max_new_tokens": most}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=eos, pad_token_id=eos, **how)
        rows = [row[len(prompt) :].tolist() for row in out]
        groups.append([Text(prompt, row[: row.index(eos) + 1] if eos in row else row) for row in rows])
    return groups


# --- the set C of a group ------------------------------------------------------------------------------------------------


def nuclei(p: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token and drop mass the smallest set that drops no more: its least probability and its size, (N, M) each."""
    least, sizes = [], []
    for rows in ranges(p.shape[0], 256):
        ascending = np.sort(p[rows].numpy(), axis=1)
        dropped = ascending.cumsum(axis=1)
        left_out = np.stack([(dropped <= m).sum(axis=1) for m in DROP_MASSES], axis=1)
        least.append(torch.from_numpy(np.take_along_axis(ascending, left_out, axis=1)))
        sizes.append(torch.from_numpy(p.shape[1] - left_out))
    return torch.cat(least), torch.cat(sizes)


def by_maximum(p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (V,), targets first, then by falling maximum; and what the worst token has beyond the first j, (V+1,).

    C is the first columns until the worst token has at most drop_mass beyond: those whose maximum is above one threshold.
    """
    highest = p.amax(0)
    highest[targets] = 2.0
    columns, worst = highest.argsort(descending=True), torch.zeros_like(highest)
    for rows in ranges(p.shape[0], 64):
        worst = torch.maximum(worst, p[rows][:, columns.flip(0)].cumsum(1).flip(1).amax(0))
    return columns, torch.cat([worst, worst.new_zeros(1)])


def gradient_errors(
    p: Tensor, targets: Tensor, hidden: Tensor, weight: Tensor, a: Tensor, order: Tensor, sizes: Sequence[int]
) -> list[dict[str, float]]:
    """Relative Frobenius errors and cosines of dhidden and dweight for upstream a (N,) and falling `sizes` of C."""
    dz = p * -a[:, None]
    dz[torch.arange(len(a)), targets] += a
    dhidden, left_out, last, errors = dz @ weight, torch.zeros_like(hidden), p.shape[1], []
    of_column = (dz.T @ hidden).double().square_().sum(1)[order]
    for size in sizes:
        columns, last = order[size:last], size
        left_out += dz[:, columns] @ weight[columns]
        cosine = torch.cosine_similarity((dhidden - left_out).double().flatten(), dhidden.double().flatten(), dim=0)
        # dweight is exact in C and 0 outside. Sequences that are all alike have weights of 0, and so no gradient.
        of_weight = float((of_column[size:].sum() / of_column.sum().clamp_min(1e-30)).sqrt())
        cosines = {"cos_dhidden": float(cosine), "cos_dweight": (1 - of_weight**2) ** 0.5}
        errors.append(
            {"dhidden": float(left_out.norm() / dhidden.norm().clamp_min(1e-30)), "dweight": of_weight} | cosines
        )
    return errors


def upstream(lengths: Sequence[int], seed: int, values: Tensor | None = None) -> Tensor:
    """SEGA's dL/dlogprob (N,): minus the centred values of the sequences, random ones by default."""
    if values is None:
        values = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed))
    return (values.mean() - values).repeat_interleave(torch.tensor(lengths))


@torch.no_grad()
def measure(
    model: Any, groups: Sequence[Sequence[Text]], temperature: float, gradients: bool, columns: Tensor | None = None
) -> dict[str, Any]:
    """What C has to hold in these groups, and what leaving the rest out does; of a head cut to `columns` where given."""
    head = model.lm_head.weight.detach() / temperature  # softmax(z / T) is the softmax of the head W / T
    v, weight = len(head), head if columns is None else head[columns]
    decisive, records, of_tokens = DROP_MASSES.index(DECISIVE), [], []
    for number, texts in enumerate(tqdm(groups, desc="measuring")):
        hidden, targets = completion_states(model, texts)
        targets = targets if columns is None else torch.searchsorted(columns, targets)
        p = (hidden @ weight.T).softmax(-1)
        entropy = torch.cat([torch.special.entr(p[rows]).sum(1) for rows in ranges(len(p), 256)])
        least, alone = nuclei(p)
        of_tokens.append(torch.stack([entropy, alone[:, decisive]], dim=1))
        in_union, before = torch.zeros(len(DROP_MASSES), len(weight), dtype=torch.bool), 0
        for k in SIZES:
            lengths = [len(t.completion) for t in texts[:k]]
            n = sum(lengths)
            q, y, x = p[:n], targets[:n], hidden[:n]
            order, worst = by_maximum(q, y)
            sizes = [int((worst > m).sum()) for m in DROP_MASSES]
            in_union |= torch.stack([(p[before:n] >= least[before:n, i, None]).any(0) for i in range(len(DROP_MASSES))])
            in_union[:, y], before = True, n
            mass = q.sum(0).double() / n
            smallest = mass.sort().values.cumsum(0)
            narrow = alone[:n, decisive] <= alone[:n, decisive].float().quantile(0.9)
            narrow_size = int((by_maximum(q[narrow], y[narrow])[1] > DECISIVE).sum())
            confidence = -torch.stack([part.mean() for part in entropy[:n].split(lengths)])
            upstreams = {"random": upstream(lengths, number), "entropy": upstream(lengths, number, confidence)}
            errors = [gradient_errors(q, y, x, weight, a, order, sizes) for a in upstreams.values() if gradients]
            for i, (m, size) in enumerate(zip(DROP_MASSES, sizes, strict=True)):
                record = {"k": k, "drop_mass": m, "tokens": n, "share": size / v, "falls_back": float(size > v / 2)}
                # What the tokens' mean allows is also the least that could keep every one of them within drop_mass.
                record |= {"union": int(in_union[i].sum()) / v, "mean_rule": int((smallest > m).sum()) / v}
                record |= {"largest_nucleus": int(alone[:n, i].max()) / v, "narrow_90_percent": narrow_size / v}
                record |= {"max_dropped": float(worst[size]), "mean_dropped": float(mass[order[size:]].sum())}
                for kind, of_kind in zip(upstreams, errors, strict=False):
                    record |= {f"{kind}_{what}": value for what, value in of_kind[i].items()}
                records.append(record)
    entropy, nucleus = torch.cat(of_tokens).T
    bins = []
    for low, high in pairwise(ENTROPY_BINS):
        inside = nucleus[(entropy >= low) & (entropy < high)]
        if len(inside):
            sizes_of_bin = {"mean": float(inside.mean()), "largest": float(inside.max())}
            bins.append({"from": low, "to": high, "tokens": len(inside) / len(nucleus), **sizes_of_bin})
    about = {f"tokens_below_{at}": float((entropy < at).float().mean()) for at in (0.01, 0.672)}
    about |= {"temperature": temperature, "vocabulary": v, "entropy": float(entropy.mean())}
    return about | {"nucleus_by_entropy": bins, "rows": summary(records)}


def summary(records: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """For each group size and drop mass the means over the groups; the widest set and the worst random errors too."""
    rows = []
    for k, m in product(SIZES, DROP_MASSES):
        mine = [r for r in records if (r["k"], r["drop_mass"]) == (k, m)]
        largest = [key for key in ("share", "random_dhidden", "random_dweight") if key in mine[0]]
        worst = {f"{key}_max": max(r[key] for r in mine) for key in largest}
        rows.append({key: statistics.fmean(r[key] for r in mine) for key in mine[0]} | worst)
    return rows


# --- times ---------------------------------------------------------------------------------------------------------------

IDENTITY = Transform.of(LogitTransform())


class Problem:
    """Logits (V, N) in memory and what else a backward starts from; both backwards add to dhidden and dweight."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, a: Tensor) -> None:
        self.hidden, self.weight, self.targets, self.a = hidden, weight, targets, a
        self.logits, self.online = weight @ hidden.T, OnlineStats.start(targets)
        self.gradients = [torch.zeros_like(hidden), torch.zeros_like(weight)]
        self.tiles = [*product(ranges(len(weight), CHUNKED.cols), ranges(len(hidden), CHUNKED.rows))]
        for (cols, rows), z in zip(self.tiles, self.cache(), strict=True):
            self.online.rows(rows).update(z, cols.start)

    def cache(self) -> list[Tensor]:
        """Tiles of fp32 logits as `chunked` keeps them, for the exact backward to use up; clears the gradients."""
        for gradient in self.gradients:
            gradient.zero_()
        return [self.logits[cols, rows].T.contiguous() for cols, rows in self.tiles]

    def exact(self, cache: list[Tensor]) -> None:
        """As `chunked` does it: dlogits in place, then two GEMMs, tile by tile."""
        dhidden, dweight = self.gradients
        gradient = LogitGradient.of(self.online, Upstream(self.a, None, None), IDENTITY)
        for (cols, rows), z in zip(self.tiles, cache, strict=True):
            dz = gradient.rows(rows).apply_(z, cols.start, IDENTITY)
            dhidden[rows].addmm_(dz, self.weight[cols])
            dweight[cols].addmm_(dz.T, self.hidden[rows])

    def approximate(self, drop_mass: float) -> Tensor | None:
        """Adds to the gradients; the mass that each token dropped (N,), or None where C passes half of V.

        Columns come in by falling maximum, a block at a time, until the worst token has 1 - drop_mass of its probability: a
        block is gathered and exponentiated once, for this test and for the GEMMs.
        """
        stats, logits, (dhidden, dweight) = self.online.finish(), self.logits, self.gradients
        v, n = logits.shape
        highest, step = torch.empty(v), max(1, CHUNKED.block // n)
        buffer = torch.empty(step, n)
        for at in ranges(v, step):  # of the log-probabilities, in blocks that stay in the level-2 cache
            torch.amax(torch.sub(logits[at], stats.lse, out=buffer[: len(logits[at])]), 1, out=highest[at])
        highest[self.targets] = torch.inf
        order, kept, chosen = highest.argsort(descending=True), torch.zeros(n), []
        # A few tokens of high entropy tell at once, and for little, when half of the columns will not do.
        widest = stats.entropy.topk(min(n, 16)).indices
        if float((logits.index_select(1, widest) - stats.lse[widest])[order[v // 2 :]].exp_().sum(0).max()) > drop_mass:
            return None
        for block in ranges(v // 2, BLOCK):
            p = logits.index_select(0, order[block]).sub_(stats.lse).exp_()
            kept += p.sum(0)
            chosen.append((block, p))
            if float(kept.min()) >= 1 - drop_mass:
                break
        else:
            return None
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(v))[self.targets]
        p_minus_1, scaled = stats.logprob.expm1(), -self.a[:, None] * self.hidden  # dL/dz = -a (p - onehot)
        unscaled = torch.zeros_like(dhidden)
        for block, p in chosen:
            hit = ((place >= block.start) & (place < block.stop)).nonzero().squeeze(1)
            p[place[hit] - block.start, hit] = p_minus_1[hit]
            unscaled.addmm_(p.T, self.weight.index_select(0, order[block]))
            dweight.index_add_(0, order[block], p @ scaled)
        dhidden.addcmul_(unscaled, self.a[:, None], value=-1)
        return (1 - kept).clamp_min_(0.0)

    def compare(self, drop_mass: float) -> dict[str, float]:
        """Alternating medians. Where the approximate one gives up, the exact one follows and counts."""
        times: dict[str, list[float]] = {"exact": [], "approximate": []}
        for _ in range(ROUNDS):
            cache, start = self.cache(), time.perf_counter()
            self.exact(cache)
            times["exact"].append(time.perf_counter() - start)
            want, cache = [g.clone() for g in self.gradients], self.cache()
            start = time.perf_counter()
            dropped = self.approximate(drop_mass)
            if dropped is None:
                self.exact(cache)
            times["approximate"].append(time.perf_counter() - start)
        errors = [float((mine - exact).norm() / exact.norm()) for mine, exact in zip(self.gradients, want, strict=True)]
        exact, approximate = (statistics.median(seconds) for seconds in times.values())
        result = {"exact": exact, "approximate": approximate, "speedup": exact / approximate}
        result |= {"dhidden": errors[0], "dweight": errors[1], "falls_back": float(dropped is None)}
        return result | {"max_dropped": 0.0 if dropped is None else float(dropped.max())}


@torch.no_grad()
def time_groups(model: Any, groups: Sequence[Sequence[Text]], temperature: float) -> list[dict[str, float]]:
    """Every drop mass and group size; means over the first groups."""
    weight, results = model.lm_head.weight.detach() / temperature, []
    for (number, texts), k in tqdm([*product(enumerate(groups[:TIMED_GROUPS]), SIZES)], desc="timing"):
        hidden, targets = completion_states(model, texts[:k])
        worst = by_maximum((hidden @ weight.T).softmax(-1), targets)[1]
        problem = Problem(hidden, weight, targets, upstream([len(t.completion) for t in texts[:k]], number))
        for m in DROP_MASSES:
            about = {"k": k, "drop_mass": m, "tokens": len(targets), "share": int((worst > m).sum()) / len(weight)}
            results.append(about | problem.compare(m))
    return summary(results)


@torch.no_grad()
def time_synthetic(n: int, d: int, v: int) -> list[dict[str, float]]:
    """Logits of which a share of the columns holds all probability, evenly: C is that share."""
    generator, results = torch.Generator().manual_seed(0), []
    for share in tqdm(SHARES, desc=f"timing N {n}, D {d}, V {v}"):
        hidden, weight = torch.randn(n, d, generator=generator), 0.05 * torch.randn(v, d, generator=generator)
        inside = torch.randperm(v, generator=generator)[: int(share * v)]
        hidden[:, 0], weight[:, 0] = 1.0, -40.0
        weight[inside, 0] = 0.0
        targets = inside[torch.randint(0, len(inside), (n,), generator=generator)]
        problem = Problem(hidden, weight, targets, torch.randn(n, generator=generator))
        results.append({"v": v, "share": share, **problem.compare(DECISIVE)})
    return results


# --- the page ------------------------------------------------------------------------------------------------------------


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (sets, errors, speed) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for i, k in enumerate(SIZES):
        rows = [row for row in result["cases"][FINAL]["rows"] if row["k"] == k]
        timed = [row for row in result["times"][FINAL] if row["k"] == k]
        x, style = [row["drop_mass"] for row in rows], {"color": f"C{i}", "ms": 4}
        sets.plot(x, [r["share"] for r in rows], "o-", label=f"k = {k}", **style)
        sets.plot(x, [max(r["mean_rule"], r["largest_nucleus"]) for r in rows], ":", **style)
        errors.plot(x, [r["random_dhidden"] for r in rows], "o-", label=f"dhidden, k = {k}", **style)
        errors.plot(x, [r["random_dweight"] for r in rows], "s--", label=f"dweight, k = {k}", **style)
        speed.plot([r["share"] for r in timed], [r["speedup"] for r in timed], "o", label=f"measured, k = {k}", **style)
        stars = [(r["share"], r["speedup"]) for r in timed if r["drop_mass"] == DECISIVE]
        speed.plot(*zip(*stars, strict=True), "*", **(style | {"ms": 16, "mec": "black"}))
    sharp = [(row["share"], row["speedup"]) for row in result["times"][SHARP]]
    speed.plot(*zip(*sharp, strict=True), "^", color="grey", mfc="none", ms=5, label="measured, sharpened, every k")
    for line, (n, d, v) in zip(("k-", "k--"), SHAPES, strict=True):
        points = [(row["share"], row["speedup"]) for row in result["synthetic"] if row["v"] == v]
        speed.plot(*zip(*points, strict=True), line, lw=1, label=f"synthetic, N {n}, D {d}, V {v}")
    lines = ((sets, 0.5, "above: exact backward", 0.4), (errors, 0.01, "1 %", 0.05), (speed, 1.3, "1.3", 0.99))
    for axes, y, text, at in lines:
        axes.axhline(y, color="grey", lw=1)
        axes.annotate(text, (at, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.grid(alpha=0.2)
    for axes in (sets, errors):
        axes.axvline(DECISIVE, color="grey", lw=1, ls=":")
        axes.set(xscale="log", xlabel="drop_mass")
    sets.set(ylim=(0, 1.02), ylabel="|C| / V", title="Columns needed (dotted: no choice of C is smaller)")
    errors.set(yscale="log", ylabel="relative Frobenius error", title="Error of the gradients")
    speed.set(xlim=(0, 1.02), yscale="log", yticks=(0.5, 1, 2, 5, 10), yticklabels=("0.5", "1", "2", "5", "10"))
    speed.set(
        xlabel="|C| / V", ylabel="speed-up, selection included", title=f"Backward (stars: drop_mass {DECISIVE:g})"
    )
    sets.legend(fontsize=8, loc="lower left")
    errors.legend(fontsize=7, loc="lower right", ncols=2)
    speed.legend(fontsize=8)
    fig.savefig(path, dpi=100)


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    first, *others = (f"| {' | '.join(map(str, row))} |" for row in (header, *rows))
    print("\n".join(["", first, f"|---{'|---:' * (len(header) - 1)}|", *others]))


def print_tables(result: dict[str, Any]) -> None:
    """As they stand in docs/drop_mass.md."""
    lines: list[Sequence[Any]] = []
    for name, case in result["cases"].items():
        sets = [f"{r['share']:.1%}" for r in case["rows"] if r["drop_mass"] == DECISIVE]
        lines.append((name, f"{case['vocabulary']:,}", f"{case['entropy']:.2f}", *sets))
    print_table(("text", "V", "mean entropy", *(f"k = {k}" for k in SIZES)), lines)
    lines = []
    for name in result["times"]:
        rows = zip(result["cases"][name]["rows"], result["times"][name], strict=True)
        for r, t in [(r, t) for r, t in rows if r["drop_mass"] == DECISIVE]:
            sets = [f"{share:.1%}" for share in (r["share"], r["union"], max(r["mean_rule"], r["largest_nucleus"]))]
            kinds = ("random_dhidden_max", "random_dweight_max", "entropy_dhidden", "entropy_dweight")
            errors = [f"{r[kind]:.1e}" for kind in kinds]
            timed = (f"{t['share']:.1%}", f"{1e3 * t['exact']:.0f} ms", f"{t['speedup']:.2f}")
            lines.append((name, int(r["k"]), f"{r['tokens']:.0f}", *sets, *errors, *timed))
    header = ("text", "k", "N", "C / V", "union", "no less than", "dhidden, worst", "dweight, worst")
    by_entropy = ("dhidden, entropy weights", "dweight, entropy weights")
    print_table((*header, *by_entropy, "C / V, timed", "exact", "speed-up"), lines)
    lines = []
    for b in result["cases"][FINAL]["nucleus_by_entropy"]:
        nucleus = [f"{b[key]:,.0f}" for key in ("mean", "largest")]
        lines.append((f"{b['from']:g} to {b['to']:g}", f"{b['tokens']:.1%}", *nucleus))
    print_table(("entropy of a token", "share of tokens", "mean nucleus", "largest"), lines)
    by_v = {v: [f"{r['speedup']:.2f}" for r in result["synthetic"] if r["v"] == v] for _, _, v in SHAPES}
    print_table(("C / V", *(f"{s:.0%}" for s in SHARES)), [(f"N {n}, D {d}, V {v}", *by_v[v]) for n, d, v in SHAPES])


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returned when this was first run."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(arguments.tokenizer), eos_token="<|endoftext|>")
    texts = read_texts(arguments.data, tokenizer)
    train(texts, tokenizer, work, 60 * arguments.minutes)
    cases: dict[str, Any] = {}
    held_out, eos = texts[-HELD_OUT:], tokenizer.eos_token_id
    prompts = [t.prompt for t in held_out[:GROUPS]]

    def on_policy(
        name: str, model: Any, groups: int, temperature: float = 1.0, gradients: bool = True
    ) -> list[list[Text]]:
        path = work / f"samples, {name}.json"
        texts = [[Text(*t) for t in g] for g in cached(path, lambda: sample(model, prompts[:groups], eos, temperature))]
        cases[name] = cached(work / f"{name}.json", lambda: measure(model, texts, temperature, gradients))
        return texts

    for share in CHECKPOINTS:
        model = LlamaForCausalLM.from_pretrained(work / f"checkpoint-{round(100 * share)}").eval()
        if share < 1:
            on_policy(f"after {share:.0%} of the training, on-policy", model, SIDE_GROUPS, gradients=False)
    main_texts = on_policy(FINAL, model, GROUPS)
    sharp_texts = on_policy(SHARP, model, SIDE_GROUPS, SHARPENED)
    groups = [held_out[rows] for rows in ranges(SIDE_GROUPS * max(SIZES), max(SIZES))]
    name, seen = (
        "end of the training, data set text",
        torch.tensor([t for text in texts for t in text.completion]).unique(),
    )
    cases[name] = cached(work / f"{name}.json", lambda: measure(model, groups, 1.0, True))
    # The steepest tail there can be: nothing for the columns that do not occur in the data.
    name = "the same, head cut to the tokens of the data"
    cases[name] = cached(work / f"{name}.json", lambda: measure(model, groups, 1.0, True, seen))
    demo, demo_tokenizer = (t.from_pretrained(arguments.demo_model) for t in (AutoModelForCausalLM, AutoTokenizer))
    questions = [json.loads(line)["prompt"] for line in arguments.demo_data.read_text().splitlines()[:GROUPS]]
    prompts, eos = demo_tokenizer(questions)["input_ids"], demo_tokenizer.eos_token_id
    on_policy("the demo's warm start, on-policy", demo.eval(), SIDE_GROUPS)

    torch.set_num_threads(arguments.timing_threads)
    times = {
        FINAL: cached(work / "times.json", lambda: time_groups(model, main_texts, 1.0)),
        SHARP: cached(work / "times, sharpened.json", lambda: time_groups(model, sharp_texts, SHARPENED)),
    }
    synthetic = cached(work / "synthetic.json", lambda: [row for shape in SHAPES for row in time_synthetic(*shape)])
    cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: ")
    about = {"device": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}
    about |= {"date": date.today().isoformat(), "tokens_of_the_data": len(seen)}
    about |= {"training": json.loads((work / "train.json").read_text())}
    return about | {"cases": cases, "times": times, "synthetic": synthetic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "tokenizer", "demo_model", "demo_data", "work", "out", "plot", "replot"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--minutes", type=float, default=34, help="of training")
    parser.add_argument("--timing_threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.replot is None:
        arguments.out.write_text(json.dumps(run(arguments), indent=1))
    result = json.loads((arguments.replot or arguments.out).read_text())
    print_tables(result)
    plot(result, arguments.plot)


if __name__ == "__main__":
    main()
