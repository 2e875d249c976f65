"""Candidates of a server: against a standard-library server that speaks the format that vLLM documents for /v1/completions."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from test_cli import refused, run, write_files
from test_ends import EOS, EOT, byte_tokenizer, ids_of
from test_score_command import SCORE

from gem import server as module
from gem.config import RolloutArguments, check
from gem.ends import Ends
from gem.generators import Completion, TransformersGenerator, draw_completions
from gem.server import TRIES, ServedModel, Server, ServerGenerator, _retry_after

PROMPTS = [[5, 6], [7], [8, 9, 10]]
Reply = Callable[["Handler", Any], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as `server.replies` say, one after the other; the last of them answers all further requests."""

    protocol_version = "HTTP/1.1"
    server: Fake

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers), None))
        self.send(200, {"object": "list", "data": self.server.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            replies = self.server.replies
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        reply(self, body)

    def send(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


class Fake(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models: list[dict[str, Any]] = [{"id": "tiny", "object": "model", "max_model_len": 64}]
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.replies: list[Reply] = [spoken]
        self.lock = threading.Lock()

    def handle_error(self, *_: Any) -> None: ...  # a client that went away

    @property
    def bodies(self) -> list[Any]:
        return [body for _, _, body in self.seen if body is not None]


def answer(
    texts: Sequence[Sequence[int]], finish: str = "stop", stop_reason: Any = None, **changes: Any
) -> dict[str, Any]:
    """Return an answer in the documented format: one choice for each list of token ids."""
    choices = [
        {
            "index": i,
            "text": "",
            "logprobs": {
                "text_offset": [0] * len(ids),
                "token_logprobs": [-0.5 - token / 8 for token in ids],
                "tokens": [""] * len(ids),
                "top_logprobs": [{}] * len(ids),
            },
            "finish_reason": finish,
            "stop_reason": stop_reason,
            "token_ids": list(ids),
            "prompt_logprobs": None,
            "prompt_token_ids": [],
            **changes,
        }
        for i, ids in enumerate(texts)
    ]
    usage = {"prompt_tokens": 2, "total_tokens": 9, "completion_tokens": 7}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "tiny",
        "choices": choices,
        "usage": usage,
    }


def said(body: Any, end: int = EOS) -> list[list[int]]:
    """Return completions that depend on prompt, seed and index alone, each ended before the limit."""
    rows = []
    for i in range(body["n"]):
        draw = random.Random(repr((body["prompt"], body.get("seed"), i)))
        rows.append([*(draw.randrange(5, 11) for _ in range(draw.randrange(1, body["max_tokens"]))), end])
    return rows


def spoken(handler: Handler, body: Any) -> None:
    handler.send(200, answer(said(body)))


def always(status: int, content: Any, **headers: str) -> Reply:
    return lambda handler, body: handler.send(status, content, **headers)


def cut_in_the_answer(handler: Handler, body: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def cut_in_a_chunk(handler: Handler, body: Any) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'ff\r\n{"choices"')
    handler.close_connection = True


def closed_without_a_word(handler: Handler, body: Any) -> None:
    handler.close_connection = True


def late(handler: Handler, body: Any) -> None:
    time.sleep(1.0)
    handler.send(200, answer(said(body)))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A server that runs, and no pauses between tries."""
    for name in (module.KEY, "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "PAUSE", 0.001)
    with Fake() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def generator(fake: Fake, *stop: str, **changes: Any) -> ServerGenerator:
    arguments = RolloutArguments(**{"max_new_tokens": 9, "server": fake.url, "server_timeout": 30.0, **changes})
    check(arguments)
    return ServerGenerator(
        ServedModel.of(arguments), byte_tokenizer(), Ends(frozenset({EOS, EOT}), stop), arguments, 264
    )


# --- what is asked, and what is read ------------------------------------------------------------------------------------


def test_completions_are_in_the_order_of_prompts_and_indices(fake: Fake) -> None:
    def shuffled(handler: Handler, body: Any) -> None:
        time.sleep(0.05 * (len(body["prompt"]) % 3))  # the answers come in another order
        content = answer(said(body))
        content["choices"].reverse()
        handler.send(200, content)

    fake.replies = [shuffled]
    found = generator(fake)(PROMPTS, 4)
    by_prompt = {tuple(body["prompt"]): body for body in fake.bodies}
    assert [[c.ids for c in group] for group in found] == [said(by_prompt[tuple(prompt)]) for prompt in PROMPTS]
    for completion in (c for group in found for c in group):
        assert completion.finish == "stop" and completion.logprobs == [-0.5 - token / 8 for token in completion.ids]


def test_a_request_leaves_nothing_to_the_servers_defaults(fake: Fake) -> None:
    torch.manual_seed(1)
    expected = torch.randint(2**48, (3,)).tolist()
    torch.manual_seed(1)
    generator(fake, "\n\n", temperature=0.7, top_p=0.9)(PROMPTS, 2)
    asked = sorted(fake.bodies, key=lambda body: PROMPTS.index(body["prompt"]))
    assert [body.pop("seed") for body in asked] == expected
    assert [body.pop("prompt") for body in asked] == PROMPTS
    common = {
        "model": "tiny", "n": 2, "max_tokens": 9, "stop": ["\n\n"], "stop_token_ids": [EOS, EOT], "temperature": 0.7,
        "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False, "logprobs": 0,
        "return_token_ids": True,
    }  # fmt: skip
    assert asked == [common] * 3
    assert [path for path, _, _ in fake.seen] == ["/v1/models", *["/v1/completions"] * 3]
    assert all("Authorization" not in headers for _, headers, _ in fake.seen)


def test_greedy_is_asked_for_once(fake: Fake) -> None:
    """vLLM refuses n > 1 at temperature 0. Nothing random is used."""
    before = torch.get_rng_state()
    found = generator(fake, temperature=0.7, top_p=0.9)(PROMPTS, 3, greedy=True)
    assert torch.equal(before, torch.get_rng_state())
    assert all(len(group) == 3 and group[0] == group[1] == group[2] for group in found)
    for body in fake.bodies:
        assert (body["n"], body["temperature"], body["top_p"], "seed" in body) == (1, 0.0, 1.0, False)


def test_several_requests_are_in_flight(fake: Fake) -> None:
    together, most, now = threading.Barrier(3, timeout=20), [0], [0]

    def waits(handler: Handler, body: Any) -> None:
        with fake.lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait()  # passes only if three are here
        with fake.lock:
            now[0] -= 1
        spoken(handler, body)

    fake.replies = [waits]
    assert len(generator(fake, rollout_batch_size=6)([[5], [6], [7], [8], [9], [10]], 2)) == 6
    assert most == [3]


@pytest.mark.parametrize(
    ("reason", "stop_reason", "ids", "finish"),
    [
        ("stop", None, [5, 6, EOS], "stop"),
        ("stop", EOT, [5, 6, EOT], "stop"),
        ("stop", "User", ids_of("me. User"), "stop"),
        ("stop", "User", ids_of("me. Use"), "length"),  # the server's detokeniser saw it, ours does not
        ("length", None, [5] * 9, "length"),
        ("length", None, [5] * 8 + [EOS], "stop"),
    ],
)
def test_how_a_completion_ended(fake: Fake, reason: str, stop_reason: Any, ids: list[int], finish: str) -> None:
    fake.replies = [always(200, answer([ids], reason, stop_reason))]
    ((completion,),) = generator(fake, "User")([[5]], 1)
    assert completion.ids == ids and completion.finish == finish
    drawn = draw_completions(
        generator(fake, "User"), [[5]], 1, Ends(frozenset({EOS, EOT}), ("User",)), byte_tokenizer()
    )
    assert drawn == [[completion]]


def test_log_probs_are_optional(fake: Fake) -> None:
    for nothing in (None, {"token_logprobs": None}):
        fake.replies = [always(200, answer([[5, EOS]], logprobs=nothing))]
        assert generator(fake)([[5]]) == [[Completion([5, EOS], "stop", None)]]


def test_no_prompts(fake: Fake) -> None:
    assert generator(fake)([], 2) == [] and not fake.bodies


# --- answers that are wrong ----------------------------------------------------------------------------------------------

GOOD = [5, 6, EOS]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            answer([GOOD, GOOD], token_ids=None),
            r"must answer with token_ids, got 'None'; gem needs a `vllm serve` of version 0.10.2",
        ),
        (answer([GOOD, []]), r"must answer with token_ids, got '\[\]'"),
        (answer([GOOD, GOOD], token_ids=["5"]), "must answer with token_ids, got"),
        (answer([GOOD]), r"must answer with 2 choices, got those of index \[0\]"),
        (answer([GOOD] * 3), r"must answer with 2 choices, got those of index \[0, 1, 2\]"),
        (answer([GOOD, GOOD], index=0), r"must answer with 2 choices, got those of index \[0\]"),
        ({"error": "no"}, "must answer with choices, got"),
        ([1], r"must answer with choices, got '\[1\]'"),
        (answer([GOOD, [5, 264]]), "must serve the model here, of 264 tokens, got token id 264"),
        (
            answer([GOOD, [5, 258]]),
            r"ended a completion at token 258 \(<pad>\), which is no end here: give --stop '<pad>', or --eos",
        ),
        (
            answer([GOOD, [5, 65]], stop_reason=65),
            r"ended a completion at token 65 \(.\), which is no end here: give --stop",
        ),
        (
            answer([GOOD, [5, 6]], "length"),
            r"cut a completion off after 2 of max_new_tokens=9: .* --generation-config vllm",
        ),
        (answer([GOOD, GOOD], "abort"), "must finish with stop or length, got finish_reason 'abort'"),
        (answer([GOOD, GOOD], "error"), "must finish with stop or length, got finish_reason 'error'"),
        (answer([GOOD, GOOD], None), "must finish with stop or length, got finish_reason None"),  # type: ignore[arg-type]
        (
            answer([GOOD, GOOD], logprobs={"token_logprobs": [-1.0]}),
            r"must answer with a log-prob for each of 3 tokens, got \[-1.0\]",
        ),
        (
            answer([GOOD, GOOD], logprobs={"token_logprobs": [None] * 3}),
            "must answer with a log-prob for each of 3 tokens",
        ),
    ],
)
def test_an_answer_that_is_wrong(fake: Fake, content: Any, message: str) -> None:
    fake.replies = [always(200, content)]
    with pytest.raises(ValueError, match=f"^server {fake.url}/v1/completions: {message}") as raised:
        generator(fake)([[5, 6]], 2)
    assert "\n" not in str(raised.value) and len(fake.bodies) == 1


# --- failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        always(429, {"error": {"message": "busy", "code": 429}}),
        always(500, b"Internal Server Error"),
        always(502, b"<html><h1>Bad gateway</h1></html>"),
        always(503, {"detail": "loading"}),
        always(200, b"<html>a proxy speaks</html>"),
        always(200, b'{"choices": ['),
        always(200, b"not gzip", Content_Encoding="gzip"),
        cut_in_the_answer,
        cut_in_a_chunk,
        closed_without_a_word,
    ],
)
def test_what_may_pass_is_tried_again(fake: Fake, reply: Reply, caplog: pytest.LogCaptureFixture) -> None:
    fake.replies = [reply, reply, spoken]
    found = generator(fake, rollout_batch_size=2)(PROMPTS, 2)
    assert [[c.ids for c in group] for group in found] == [said(body) for body in fake.bodies[2:]]
    assert fake.bodies[0] == fake.bodies[1] == fake.bodies[2]  # with the same seed
    told = [record.getMessage() for record in caplog.records if record.name == "gem.server"]
    assert (
        len(told) == 1
        and f"server {fake.url}/v1/completions: " in told[0]
        and "; trying 8 times, for minutes" in told[0]
    )


def test_a_late_answer_is_tried_again(fake: Fake) -> None:
    fake.replies = [late, spoken]
    assert len(generator(fake, server_timeout=0.2)([[5]], 2)) == 1 and len(fake.bodies) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (always(500, {"error": {"message": "out of\nmemory"}}), "status 500: out of memory"),
        (always(503, {"detail": "loading"}), "status 503: loading"),
        (always(502, b" <h1>Bad\n gateway</h1> " * 99), "status 502: <h1>Bad gateway</h1> <h1>Bad"),
        (always(200, b"<html>"), "status 200 without JSON: <html>"),
        (always(500, b""), "status 500: Internal Server Error"),
        (cut_in_the_answer, "IncompleteRead"),
        (late, r"no answer within 0.1 s"),
    ],
)
def test_what_does_not_pass_is_told_in_the_servers_words(
    fake: Fake, reply: Reply, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRIES", 3)
    fake.replies = [reply]
    timeout = 0.1 if reply is late else 60.0
    with pytest.raises(
        ValueError, match=rf"^server {fake.url}/v1/completions: .*{message}.* \(tried 3 times\)$"
    ) as raised:
        generator(fake, server_timeout=timeout)([[5]], 2)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 420 and len(fake.bodies) == 3


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (400, {"error": {"message": "max_tokens is too large", "type": "BadRequestError"}}, "max_tokens is too large"),
        (401, {"error": "Unauthorized"}, "Unauthorized"),
        (404, {"object": "error", "message": "The model `tiny` does not exist."}, "The model `tiny` does not exist."),
        (
            422,
            {"detail": [{"loc": ["body", "n"], "msg": "not allowed"}]},
            r'\[{"loc": \["body", "n"\], "msg": "not allowed"}\]',
        ),
        (307, b"", "Temporary Redirect"),
    ],
)
def test_a_refusal_is_final(fake: Fake, status: int, content: Any, words: str) -> None:
    fake.replies = [always(status, content)]
    with pytest.raises(
        ValueError, match=rf"^server {fake.url}/v1/completions: status {status}: {words} \(tried once\)$"
    ):
        generator(fake)([[5]], 2)
    assert len(fake.bodies) == 1


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.001)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        ValueError, match=rf"127.0.0.1:{port}/v1/models: .*Connection refused.* \(tried {TRIES} times\)$"
    ):
        Server(f"http://127.0.0.1:{port}/v1/").ask("/v1/models")


def test_a_server_may_ask_us_to_wait(fake: Fake) -> None:
    fake.replies = [always(429, {"error": {"message": "slowly"}}, Retry_After="0.4"), spoken]
    ask, start = generator(fake), time.monotonic()
    assert len(ask([[5]], 2)) == 1
    assert time.monotonic() - start >= 0.4


@pytest.mark.parametrize(("value", "low", "high"), [("3", 3, 3), ("0.5", 0.5, 0.5), ("-4", 0, 0), ("date", 50, 70)])
def test_how_long_a_server_asks_us_to_wait(value: str, low: float, high: float) -> None:
    reply = requests.Response()
    reply.headers["Retry-After"] = formatdate(time.time() + 60, usegmt=True) if value == "date" else value
    found = _retry_after(reply)
    assert found is not None and low <= found <= high


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf"])
def test_a_wait_that_is_none(value: str) -> None:
    reply = requests.Response()
    reply.headers["Retry-After"] = value
    assert _retry_after(reply) is None


def test_an_interruption_waits_for_nobody(fake: Fake) -> None:
    released = threading.Event()
    fake.replies = [lambda handler, body: released.wait(30) and None]
    ask, start = generator(fake), time.monotonic()

    def interrupt() -> None:
        while len(fake.bodies) < 3:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(PROMPTS, 2)
    finally:
        signal.signal(signal.SIGINT, before)
        released.set()
    assert time.monotonic() - start < 10


# --- addresses, models and keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["host:8000", "ftp://host", "http://", "http://host:x", "http://host:99999", "", "http://[::1"]
)
def test_what_is_no_address(url: str) -> None:
    for make in (Server, lambda url: check(RolloutArguments(server=url))):
        with pytest.raises(ValueError, match="server must be a URL such as http://localhost:8000, got "):
            make(url)


@pytest.mark.parametrize(
    "url", ["http://me:secret@host:8000", "me:secret@host", "http://host/?key=secret", "http://host#secret"]
)
@pytest.mark.parametrize("command", ["score", "train", "eval"])
def test_an_address_with_a_secret_is_not_repeated(
    url: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, command, "--model", "m", "--data", "d.jsonl", "--server", url)
    assert "server must be a URL without user, password, query and blanks; a key goes into VLLM_API_KEY" in message
    assert "secret" not in message


def test_the_model_is_asked_for(fake: Fake) -> None:
    assert ServedModel.of(RolloutArguments(server=f"{fake.url}/v1/")).name == "tiny"
    fake.models.append({"id": "adapter"})
    with pytest.raises(
        ValueError, match=rf"server_model must be a model that {fake.url} serves \(tiny, adapter\), got None"
    ):
        generator(fake)
    with pytest.raises(ValueError, match=r"server_model must be .* \(tiny, adapter\), got 'other'"):
        generator(fake, server_model="other")
    named = generator(fake, server_model="adapter")
    assert (named.served.name, named.served.max_length) == ("adapter", 0) and named([[5]])
    assert fake.bodies[0]["model"] == "adapter"
    fake.models = []
    with pytest.raises(ValueError, match=r"serves \(none\), got None"):
        generator(fake)
    fake.models = [{"name": "x"}]
    with pytest.raises(ValueError, match=f"server {fake.url}/v1/models: must list models, got"):
        generator(fake)


def test_rows_longer_than_the_server_takes(fake: Fake) -> None:
    assert generator(fake)([[5] * 55])
    with pytest.raises(
        ValueError,
        match=rf"max_new_tokens=9 behind a prompt of 56 tokens must fit into the 64 tokens of {fake.url} \(vllm",
    ):
        generator(fake)([[5], [5] * 56])
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({"OPENAI_API_KEY": "sk-open"}, None),
        ({"OPENAI_API_KEY": "sk-open", "VLLM_API_KEY": " sk-own\n"}, "Bearer sk-own"),
        ({"VLLM_API_KEY": ""}, None),
    ],
)
def test_a_key_goes_with_every_request_and_into_no_message(
    fake: Fake,
    keys: dict[str, str],
    sent: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    key = (sent or "Bearer sk-open").split()[1]
    fake.replies = [always(500, {"detail": f"no {key}"}), always(401, {"error": f"wrong key {key}"})]
    ask = generator(fake)
    shown = r"\*\*\*" if sent else key  # a key that is not used is no secret of ours
    with pytest.raises(ValueError, match=rf"status 401: wrong key {shown} \(tried once\)"):
        ask([[5]], 2)
    keys_sent = [h.get("Authorization", "") for _, h, _ in fake.seen if h.get("Authorization", "").startswith("Bearer")]
    assert keys_sent == ([sent] * 3 if sent else []) and len(fake.seen) == 3
    assert sent is None or (key not in caplog.text + repr(ask) and "no ***" in caplog.text)
    fake.replies = [always(200, {"error": {"message": f"expired {key}"}})]
    with pytest.raises(ValueError, match=f"must answer with choices, got .*expired {shown}"):
        ask([[5]], 2)


def test_a_key_that_no_header_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-a\nsk-b")
    with pytest.raises(ValueError, match="VLLM_API_KEY must be visible ASCII characters, got others") as raised:
        Server("http://localhost")
    assert "sk-" not in str(raised.value)


# --- the commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, a tokenizer and pairs, without waiting for the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda number: None)
    return write_files(tmp_path)


def test_score_writes_the_groups_that_transformers_would(
    files: Path, fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers with the tokens of a run in this process: the same file, byte for byte."""
    tokens: dict[tuple[int, ...], list[list[int]]] = {}
    sample = TransformersGenerator.__call__

    def noted(self: Any, prompts: Any, n: int = 1, **options: Any) -> Any:
        found = sample(self, prompts, n, **options)
        tokens.update({tuple(p): [c.ids for c in group] for p, group in zip(prompts, found, strict=True)})
        return found

    with monkeypatch.context() as patched:
        patched.setattr(TransformersGenerator, "__call__", noted)
        assert run(capsys, *SCORE, "--output", "here.jsonl")[0] == 0
    assert len(tokens) == 8

    def same(handler: Handler, body: Any) -> None:
        rows = tokens[tuple(body["prompt"])]
        content = answer(rows)
        for choice, ids in zip(content["choices"], rows, strict=True):
            choice["finish_reason"] = "stop" if ids[-1] in body["stop_token_ids"] else "length"
        handler.send(200, content)

    fake.replies = [same]
    status, _, err = run(capsys, *SCORE, "--output", "there.jsonl", "--server", fake.url)
    assert status == 0, err
    assert Path("there.jsonl").read_bytes() == Path("here.jsonl").read_bytes()
    assert {body["model"] for body in fake.bodies} == {"tiny"} and len(fake.bodies) == 8


def seeded(handler: Handler, body: Any) -> None:
    handler.send(200, answer(said(body, end=2)))


def test_score_goes_on_exactly_where_the_server_failed(
    files: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    score = [*SCORE, "--server", fake.url, "--output"]
    fake.replies = [seeded]
    assert run(capsys, *score, "whole.jsonl")[0] == 0
    bodies = {json.dumps(body) for body in fake.bodies}
    fake.replies = [seeded, seeded, seeded, always(400, {"error": {"message": "gone"}})]
    status, _, err = run(capsys, *score, "cut.jsonl")
    assert status == 2 and Path("cut.jsonl").read_bytes() != Path("whole.jsonl").read_bytes()
    kept = "cut.jsonl holds 3 of 8 groups, and the same command goes on from there"
    assert err.splitlines()[-1].endswith(f"status 400: gone (tried once); {kept}")
    fake.replies = [seeded]
    # At another address the same model gives the same.
    assert run(capsys, *SCORE, "--server", f"{fake.url}/v1", "--server_timeout", "30", "--output", "cut.jsonl")[0] == 0
    assert {json.dumps(body) for body in fake.bodies} == bodies  # the same seeds, too
    assert Path("cut.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    header = Path("whole.jsonl").read_text().splitlines()[0]
    assert "server" not in header
    fake.models.append({"id": "adapter"})
    other = refused(capsys, *score, "cut.jsonl", "--server_model", "adapter")
    assert (
        "output must be new or a file of the same run" in other and "server_model: None there, 'adapter' now" in other
    )
    fake.shutdown()  # a finished file needs no server
    assert run(capsys, *score, "cut.jsonl")[1].startswith("cut.jsonl holds this run, finished:")


def test_eval_asks_the_server(files: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.replies = [seeded]
    command = ["eval", "--model", "cfg/config.json", "--tokenizer", "tok", "--data", "pairs.jsonl", "--device", "cpu"]
    status, out, err = run(capsys, *command, "--max_new_tokens", "5", "--eval_samples", "2", "--server", fake.url)
    assert status == 0, err
    assert {"accuracy_greedy", "accuracy_sampled", "length"} <= json.loads(out).keys()
    assert sorted((body["n"], body["temperature"]) for body in fake.bodies) == [(1, 0.0)] * 8 + [(2, 1.0)] * 8
    fake.models[0]["max_model_len"] = 8
    longest = json.loads(Path("pairs.jsonl").read_text().splitlines()[0])
    Path("long.jsonl").write_text(json.dumps(longest) + "\n" + json.dumps({**longest, "prompt": "3" * 40}) + "\n")
    few = [*command[:-3], "long.jsonl", *command[-2:], "--max_new_tokens", "5", "--server", fake.url]
    fake.models[0]["max_model_len"] = 30
    status, _, err = run(capsys, *few, "--eval_limit", "1")
    assert status == 0, err  # the second record is not sampled from
    assert "must fit into the 30 tokens of" in refused(capsys, *few)
    fake.models[0]["max_model_len"] = 8
    assert "must fit into the 8 tokens of" in refused(capsys, *command, "--max_new_tokens", "5", "--server", fake.url)
