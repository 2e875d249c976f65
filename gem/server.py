"""Candidates from a server that speaks vLLM's completions API: token ids go in, token ids and log-probs come out."""

from __future__ import annotations

import email.utils
import json
import logging
import math
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import time
from typing import Any

import requests
import torch
from tqdm.auto import tqdm

from gem.config import RolloutArguments, check_url
from gem.ends import Ends
from gem.generators import Completion, Finish, warn_of_top_p

logger = logging.getLogger(__name__)

TRIES = 8
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try; doubled each time: two minutes in all
LONGEST_WAIT = 600.0  # seconds that a server may ask us to wait
CONNECT = 10.0  # seconds within which a connection must stand
IN_FLIGHT = 256  # requests at once, at most
KEY = "VLLM_API_KEY"
NEEDS = "a `vllm serve` of version 0.10.2 or later"  # the first with return_token_ids
PATH = "/v1/completions"
BROKEN = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError)

Json = Mapping[str, Any]


class _TryAgain(Exception):  # noqa: N818 - it is no error yet
    """A failure that may pass. `wait`: seconds that the server asks for; None: it does not say. `kind` is logged once."""

    def __init__(self, what: str, wait: float | None = None, kind: str = "") -> None:
        super().__init__(what)
        self.wait, self.kind = wait, kind or what


class Server:
    """The address of a server: JSON in, JSON out. What may pass is tried again, after a pause that doubles.

    The key is in the environment, VLLM_API_KEY, and in no message.

    Args:
        url: http(s)://host:port, with or without /v1.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        check_url("server", url)
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self._key = os.environ.get(KEY, "").strip()
        if any(not "!" <= letter <= "~" for letter in self._key):
            raise ValueError(f"{KEY} must be visible ASCII characters, got others among its {len(self._key)}")
        self._told: set[str] = set()  # kinds of failures that were logged

    def ask(
        self,
        path: str,
        body: Json | None = None,
        session: requests.Session | None = None,
        stopped: threading.Event | None = None,
    ) -> Any:
        """Return the JSON of an answer.

        Args:
            path: behind the url.
            body: is posted; None: GET.
            session: keeps connections; None: one of its own.
            stopped: ends a pause when it is set: nobody waits for the answer any more.

        Raises:
            ValueError: the server refuses, or all tries failed; one line with the address, the status and its words.
        """
        if session is None:
            with requests.Session() as session:
                return self.ask(path, body, session, stopped)
        stopped = stopped or threading.Event()
        for tries in range(1, TRIES + 1):
            try:
                return self._once(session, path, body)
            except _TryAgain as failure:
                what, wait, kind = str(failure), failure.wait, failure.kind
            if tries < TRIES:
                pause = min(PAUSE * 2 ** (tries - 1), LONGEST_PAUSE) * _JITTER.uniform(0.5, 1.0)
                pause = max(pause, min(wait or 0.0, LONGEST_WAIT))
                if kind not in self._told:
                    self._told.add(kind)
                    logger.warning("server %s%s: %s; trying %d times, for minutes", self.url, path, what, TRIES)
                if stopped.wait(pause):
                    break
        raise ValueError(f"server {self.url}{path}: {what} (tried {tries} times)")

    def _once(self, session: requests.Session, path: str, body: Json | None) -> Any:
        """Send one request and return the JSON of its answer."""
        method, url = "GET" if body is None else "POST", self.url + path
        waits = CONNECT, self.timeout
        try:
            answer = session.request(method, url, json=body, timeout=waits, auth=self._signed(), allow_redirects=False)
        except requests.exceptions.SSLError as error:  # a certificate does not become right by waiting
            raise ValueError(f"server {url}: {self.clean(_cause(error))}") from None
        except requests.exceptions.ProxyError as error:
            raise _TryAgain(
                f"the proxy of this environment (HTTP_PROXY, NO_PROXY): {self.clean(_cause(error))}"
            ) from None
        except requests.Timeout as error:
            late = isinstance(error, requests.ConnectTimeout)
            raise _TryAgain(
                f"no {'connection' if late else 'answer'} within {waits[0] if late else waits[1]:g} s"
            ) from None
        except BROKEN as error:
            raise _TryAgain(self.clean(_cause(error))) from None
        except requests.RequestException as error:
            raise ValueError(f"server {url}: {self.clean(str(error))}") from None
        status = answer.status_code
        if status in (408, 429) or status >= 500:
            raise _TryAgain(f"status {status}: {self._words(answer)}", _retry_after(answer), f"status {status}")
        if status != 200:
            elsewhere = f" (to {self.clean(answer.headers['Location'])})" if "Location" in answer.headers else ""
            raise ValueError(f"server {url}: status {status}: {self._words(answer)}{elsewhere} (tried once)")
        try:
            return answer.json()
        except (ValueError, RecursionError):
            raise _TryAgain(f"status 200 without JSON: {self._words(answer)}", kind="no JSON") from None

    def _signed(self) -> Callable[[Any], Any] | None:
        """Return what signs a request. As a header of the session, an entry in ~/.netrc would replace it."""
        if not self._key:
            return None

        def sign(request: Any) -> Any:
            request.headers["Authorization"] = f"Bearer {self._key}"
            return request

        return sign

    def _words(self, answer: requests.Response) -> str:
        """Return what a server says: of vLLM {"error": {"message"}}, of FastAPI {"detail"}, else the text's beginning."""
        try:
            said = answer.json()
        except (ValueError, RecursionError):
            said = answer.text
        for name in ("error", "message", "detail"):
            said = said[name] if isinstance(said, dict) and said.get(name) else said
        return self.clean(said if isinstance(said, str) else json.dumps(said)) or answer.reason or "no words"

    def clean(self, text: str) -> str:
        """Return the beginning of a text from outside, in one line and without the key."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:300]


_JITTER = random.Random()  # of its own: sampling must not depend on how often a server failed


def _cause(error: BaseException) -> str:
    """Return the innermost reason of an error, which requests and urllib3 wrap several times."""
    while inner := getattr(error, "reason", None) or error.__cause__ or error.__context__:
        if not isinstance(inner, BaseException):
            break
        error = inner
    return str(error) or type(error).__name__


def _retry_after(answer: requests.Response) -> float | None:
    """Return the header Retry-After in seconds: it gives them, or a date."""
    value = answer.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


@dataclass(frozen=True)
class ServedModel:
    """A model of a server: its name there, and how many tokens a row may have (0: the server does not say)."""

    server: Server
    name: str
    max_length: int = 0

    @classmethod
    def of(cls, arguments: RolloutArguments) -> ServedModel:
        """Ask a server for its models, and return the one that is meant: `server_model`, or the only one.

        Raises:
            ValueError: it serves no such model, or several of which none is named.
        """
        server = Server(arguments.server or "", arguments.server_timeout)
        answer = server.ask("/v1/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise ValueError(
                f"server {server.url}/v1/models: must list models, got {server.clean(str(answer))[:100]!r}; gem needs {NEEDS}"
            )
        names = [str(card["id"]) for card in cards]
        name = arguments.server_model or (names[0] if len(names) == 1 else None)
        if name not in names:
            served = server.clean(", ".join(names)) or "none"
            raise ValueError(f"server_model must be a model that {server.url} serves ({served}), got {name!r}")
        length = cards[names.index(name)].get("max_model_len")
        return cls(server, name, length if isinstance(length, int) else 0)

    def check_room(self, prompts: Sequence[Sequence[int]], arguments: RolloutArguments) -> None:
        """Check that the server takes every prompt followed by max_new_tokens.

        Raises:
            ValueError: its --max-model-len is too small.
        """
        longest = max(map(len, prompts), default=0)
        if prompts and 0 < self.max_length < longest + arguments.max_new_tokens:
            raise ValueError(
                f"max_new_tokens={arguments.max_new_tokens} behind a prompt of {longest} tokens must fit into the "
                f"{self.max_length} tokens of {self.server.url} (vllm serve --max-model-len)"
            )


@dataclass(frozen=True)
class ServerGenerator:
    """Generator over a `vllm serve`: one request a prompt, rollout_batch_size // n of them in flight.

    Each request has a seed from torch's global generator, and names every setting that a model's own generation config would
    else decide. Log-probs are the server's, at temperature 1 (vLLM's default, --logprobs-mode raw_logprobs).

    Args:
        served: the model that answers.
        tokenizer: of the model here, which must be the server's.
        ends: where completions end.
        arguments: max_new_tokens, temperature, top_p, rollout_batch_size.
        vocabulary: token ids are below it.
    """

    served: ServedModel
    tokenizer: Any
    ends: Ends
    arguments: RolloutArguments
    vocabulary: int

    def __call__(
        self, prompts: Sequence[Sequence[int]], n: int = 1, *, greedy: bool = False, progress: str | None = None
    ) -> list[list[Completion]]:
        """Return n completions of each prompt; see Generator.

        Raises:
            ValueError: the server fails (see Server.ask), or answers with what is no completion of this model.
        """
        self.served.check_room(prompts, self.arguments)
        warn_of_top_p(self.arguments, greedy)
        asked = 1 if greedy else n  # vLLM refuses copies of a greedy completion
        seeds = [None] * len(prompts) if greedy else torch.randint(2**48, (len(prompts),)).tolist()
        bodies = [self._body(prompt, asked, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        at_once = min(len(bodies), IN_FLIGHT, max(1, self.arguments.rollout_batch_size // asked))
        found = self._all(bodies, at_once, progress)
        return [group * n for group in found] if greedy else found

    def _body(self, prompt: Sequence[int], n: int, seed: int | None) -> Json:
        """Return a request; greedy without a seed."""
        arguments, greedy = self.arguments, seed is None
        sampling = (
            {"temperature": 0.0, "top_p": 1.0} if greedy else {"seed": seed, "temperature": arguments.temperature}
        )
        return {
            "model": self.served.name,
            "prompt": list(prompt),
            "n": n,
            "max_tokens": arguments.max_new_tokens,
            "stop": list(self.ends.texts),
            "stop_token_ids": sorted(self.ends.ids),
            "top_p": arguments.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,  # a stop text may contain them
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            **sampling,
        }

    def _all(self, bodies: Sequence[Json], at_once: int, progress: str | None) -> list[list[Completion]]:
        """Return the answers in the order of the requests.

        The threads are daemons, which a ThreadPoolExecutor's are not: an interrupted command does not wait for them.
        """
        jobs: SimpleQueue[tuple[int, Json]] = SimpleQueue()
        done: SimpleQueue[tuple[int, list[Completion] | BaseException]] = SimpleQueue()
        stopped = threading.Event()
        for job in enumerate(bodies):
            jobs.put(job)

        def work() -> None:
            with requests.Session() as session:
                while not stopped.is_set():
                    try:
                        i, body = jobs.get_nowait()
                    except Empty:
                        return
                    try:
                        done.put((i, self._completions(self.served.server.ask(PATH, body, session, stopped), body)))
                    except BaseException as error:  # raised again in the thread that asked
                        done.put((i, error))

        found: list[list[Completion]] = [[] for _ in bodies]
        try:
            for _ in range(at_once):
                threading.Thread(target=work, daemon=True).start()
            for _ in tqdm(bodies, desc=progress, disable=progress is None, leave=False):
                i, answer = done.get()
                if isinstance(answer, BaseException):
                    raise answer
                found[i] = answer
        finally:
            stopped.set()
        return found

    def _completions(self, answer: Any, body: Json) -> list[Completion]:
        """Return the completions of an answer, checked, in the order of their index."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self._wrong(f"must answer with choices, got {str(answer)[:100]!r}; gem needs {NEEDS}")
        by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
        if len(choices) != body["n"] or by_index.keys() != set(range(body["n"])):
            raise self._wrong(f"must answer with {body['n']} choices, got those of index {list(by_index)}")
        return [self._completion(by_index[i]) for i in range(body["n"])]

    def _completion(self, choice: Json) -> Completion:
        """Return a completion: its tokens, how it ended, and its log-probs if the server gives them."""
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not ids or any(type(token) is not int for token in ids):
            raise self._wrong(f"must answer with token_ids, got {str(ids)[:80]!r}; gem needs {NEEDS}")
        if beyond := [token for token in ids if not 0 <= token < self.vocabulary]:
            raise self._wrong(f"must serve the model here, of {self.vocabulary} tokens, got token id {beyond[0]}")
        finish: Finish = "stop" if self.ends.has_ended(self.ends.cut(ids, self.tokenizer), self.tokenizer) else "length"
        self._check_end(choice, ids, finish)
        logprobs = choice.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if values is None:
            return Completion(ids, finish)
        if (
            not isinstance(values, list)
            or len(values) != len(ids)
            or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        ):
            raise self._wrong(f"must answer with a log-prob for each of {len(ids)} tokens, got {str(values)[:80]}")
        return Completion(ids, finish, [float(value) for value in values])

    def _check_end(self, choice: Json, ids: Sequence[int], finish: Finish) -> None:
        """Raise if the server ended a completion for a reason that is none here."""
        said, reason = choice.get("finish_reason"), choice.get("stop_reason")
        if said not in ("stop", "length"):
            raise self._wrong(f"must finish with stop or length, got finish_reason {said!r}")
        if len(ids) > self.arguments.max_new_tokens:
            raise self._wrong(
                f"must answer with at most max_new_tokens={self.arguments.max_new_tokens} tokens, got {len(ids)}"
            )
        if finish == "stop" or reason in self.ends.texts:
            return
        if said == "stop":
            at = reason if isinstance(reason, int) and 0 <= reason < self.vocabulary else ids[-1]
            token = self.tokenizer.convert_ids_to_tokens(at)
            raise self._wrong(
                f"ended a completion at token {at} ({token}), which is no end here: give --stop {token!r}, or --eos_token"
            )
        if len(ids) < self.arguments.max_new_tokens:
            raise self._wrong(
                f"cut a completion off after {len(ids)} of max_new_tokens={self.arguments.max_new_tokens}: a limit of its own "
                "applies (vllm serve --generation-config vllm leaves the model's out)"
            )

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"server {self.served.server.url}{PATH}: {self.served.server.clean(what)}")
