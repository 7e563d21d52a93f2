"""The reward of a server (`python -m alignlab.serve_reward`), on this machine or another one. Scoring
overlaps sampling.

What may be a passing trouble (no connection, a timeout, 408, 429, 5xx, an answer that is cut or garbled) is
asked again after a growing, jittered wait. What would not pass (another 4xx, too few scores, a score that is
no number, another reward than at the start) is a RewardError at once. A null is a score that was not finite
there, and is NaN here. No score is ever made up.
"""

import json
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor
from urllib3.exceptions import HTTPError, NewConnectionError, TimeoutError

from alignlab.rewards.compose import RewardError
from alignlab.rewards.exchange import Answer, Endless, Late, connections, exchange
from alignlab.rewards.servers import BOUND, TOKEN, address, refuse_unnamed, token, token_for
from alignlab.rewards.wire import TYPES, pack

PROTOCOL = 1
LONGEST_WAIT = 30.0
"""Seconds between two attempts, at most."""
AGAIN = (408, 429)
"""Refusals that may pass, beside every 5xx."""


class Trouble(Exception):
    """Why one attempt failed, and may not the next time."""


class Remote:
    """What a reward server says of the images. Not differentiable. Unit, range and the rest are the server's
    own.

    Args:
        url: of the server, http:// or https://. Within a command it must be one that the user named
            (alignlab/rewards/servers.py).
        name: the reward that it must hold; None takes any. The one that it held at the start it must hold to
            the end.
        form: "png" (8 bits a channel, small) or "safetensors" (float32, exact).
        batch_size: images of one request. [images]
        ahead: rollouts that may wait for their scores while the next one is sampled, one more than it are
            asked for at once; 0 waits for each. [rollouts]
        retries: attempts after the first one. [attempts]
        backoff: seconds before the second attempt, twice as many before each further one, up to 30; each is
            shortened by up to a half at random. [seconds]
        timeout: seconds of one attempt, from the connection to the answer's last byte. [seconds]

    Raises:
        ValueError: for an url or a number that cannot be.
        RewardError: if the server does not answer, or is no reward server.
    """

    differentiable = False
    needs_prompt = True
    unit = "the server's"
    typical_range = (-math.inf, math.inf)
    input_size: int | None = None
    licence = "unstated"

    @staticmethod
    def check(
        url: str,
        *,
        form: str = "png",
        batch_size: int = 16,
        ahead: int = 1,
        retries: int = 8,
        backoff: float = 0.5,
        timeout: float = 120.0,
        **_: Any,
    ) -> None:
        try:
            address(url)
        except ValueError as error:
            raise ValueError(f"url={error}") from None
        refuse_unnamed(url)
        if form not in TYPES:
            raise ValueError(f"form={form} is not one of {', '.join(TYPES)}")
        if batch_size < 1 or ahead < 0 or retries < 0 or backoff < 0 or not timeout > 0:
            raise ValueError(
                f"batch_size={batch_size} must be at least 1, ahead={ahead}, retries={retries} and "
                f"backoff={backoff} at least 0, timeout={timeout} positive"
            )

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        form: Literal["png", "safetensors"] = "png",
        batch_size: int = 16,
        ahead: int = 1,
        retries: int = 8,
        backoff: float = 0.5,
        timeout: float = 120.0,
    ) -> None:
        self.check(
            url,
            form=form,
            batch_size=batch_size,
            ahead=ahead,
            retries=retries,
            backoff=backoff,
            timeout=timeout,
        )
        self.url, self.form, self.batch_size, self.ahead = url.rstrip("/"), form, batch_size, ahead
        self.retries, self.backoff, self.timeout = retries, backoff, timeout
        self._token = token_for(url)
        self._http = connections(ahead + 1)
        self._jitter = (
            random.Random()
        )  # a stream of its own: the run's draws are the same however often a server fails
        said = self._declaration(self._ask("GET", "/health", None))
        if name is not None and said["reward"] != name:
            raise RewardError(
                f"the reward server {self.url} holds {plain(said['reward'])}, not {name}; start it with "
                f"reward={name}"
            )
        self.held, self.digest, self.unit = said["reward"], said["digest"], plain(said["unit"])
        low, high = said["typical_range"]
        self.typical_range = (
            -math.inf if low is None else float(low),
            math.inf if high is None else float(high),
        )
        self.needs_prompt = bool(said.get("needs_prompt", True))
        self.input_size, self.licence = _count(said.get("input_size")), plain(said.get("licence", "unstated"))
        self.batch_size = min(batch_size, _count(said.get("max_images")) or batch_size)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.submit(images, prompts).result().to(images.device)

    def submit(self, images: Tensor, prompts: Sequence[str]) -> Future[Tensor]:
        """The scores [B] float32 on the CPU, when they are there; or the RewardError. The thread that waits
        for them holds up no exit."""
        pictures, texts, future = images.detach().float().cpu(), list(prompts), Future[Tensor]()

        def work() -> None:
            try:
                future.set_result(self._scores(pictures, texts))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=work, daemon=True, name=f"reward {self.held}").start()
        return future

    def _scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores: list[float] = []
        for k in range(0, len(prompts), self.batch_size):
            texts = prompts[k : k + self.batch_size]
            body = pack(images[k : k + self.batch_size], texts, self.form)
            scores += self._checked(self._ask("POST", "/score", body), len(texts))
        return torch.tensor(scores, dtype=torch.float32)

    def _checked(self, answer: Any, n: int) -> list[float]:
        """The n scores of an answer."""
        if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
            raise RewardError(
                f"the reward server {self.url} answered without a list of scores; is it {_START}?"
            )
        if (answer.get("reward"), answer.get("digest")) != (self.held, self.digest):
            raise RewardError(
                f"the reward server {self.url} holds {plain(answer.get('reward'))} "
                f"({plain(answer.get('digest'))}) now, and held {plain(self.held)} ({plain(self.digest)}) "
                f"when this run asked first; start it as it was, and go on with {self._resume}"
            )
        scores = answer["scores"]
        if len(scores) != n:
            raise RewardError(f"the reward server {self.url} gave {len(scores)} scores for {n} images")
        wrong = [s for s in scores if s is not None and not _is_finite(s)]
        if wrong:
            raise RewardError(
                f"the reward server {self.url} gave the score {plain(wrong[0], 40)} ({len(wrong)} of {n} are "
                "no finite numbers)"
            )
        return [math.nan if s is None else float(s) for s in scores]

    @property
    def _resume(self) -> str:
        return f"resume=RUN 'allow_servers=[{self.url}]'"

    def _declaration(self, answer: Any) -> dict[str, Any]:
        good = (
            isinstance(answer, dict)
            and answer.get("protocol") == PROTOCOL
            and all(isinstance(answer.get(key), str) for key in ("reward", "digest", "unit"))
            and isinstance(answer.get("typical_range"), list)
            and len(answer["typical_range"]) == 2
            and all(bound is None or _is_finite(bound) for bound in answer["typical_range"])
        )
        if not good:
            raise RewardError(f"{self.url}/health is not the declaration of a reward; start {_START} there")
        return answer

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        """The JSON that the server answers, asked up to 1 + retries times."""
        began, trouble = time.monotonic(), ""
        for attempt in range(1 + self.retries):
            if attempt:
                wait = min(self.backoff * 2 ** (attempt - 1), LONGEST_WAIT)
                time.sleep(wait * (1 - self._jitter.random() / 2))
            try:
                return self._attempt(method, path, body)
            except Trouble as error:
                trouble = str(error)
        mend = (
            f"start it ({_START})"
            if path == "/health"
            else f"start it again ({_START}), then go on with {self._resume}: the run is intact"
        )
        raise RewardError(
            f"the reward server {self.url} gave no answer in {1 + self.retries} attempts over "
            f"{time.monotonic() - began:.0f} s (the last: {trouble}); {mend}"
        )

    def _attempt(self, method: str, path: str, body: bytes | None) -> Any:
        """The answer to one request, as JSON.

        Raises:
            Trouble: if the next attempt may do better.
            RewardError: if it would not.
        """
        headers = {"Content-Type": TYPES[self.form]} if body is not None else {}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        most = 2**16 + 64 * self.batch_size
        try:
            answer = exchange(
                self._http,
                method,
                self.url + path,
                body=body,
                headers=headers,
                timeout=self.timeout,
                most=most,
            )
        except Endless:
            raise RewardError(
                f"the reward server {self.url} answered with more than {most} bytes; is it {_START}?"
            ) from None
        except Late:
            raise Trouble(f"no whole answer within timeout={self.timeout:g} s") from None
        except (HTTPError, OSError) as error:
            refused = isinstance(error, NewConnectionError)  # among urllib3's timeouts
            causes = (error, *error.args)  # one that came while the request was sent is wrapped
            if any(isinstance(cause, TimeoutError) for cause in causes) and not refused:
                raise Trouble(f"no answer within timeout={self.timeout:g} s") from None
            raise Trouble(_reason(error)) from None
        return self._read(answer)

    def _read(self, received: Answer) -> Any:
        status, kind, text = received.status, received.kind, received.body
        try:
            answer = json.loads(text) if kind.startswith("application/json") else None
        except (ValueError, RecursionError):
            answer = None
        said = plain(answer["error"]) if isinstance(answer, dict) and "error" in answer else ""
        if status in AGAIN or status >= 500:
            raise Trouble(f"HTTP {status} {said}".strip())
        if status in (401, 403):
            why = "" if self._token is not None or token() is None else f", and add {self.url} to {BOUND}"
            raise RewardError(
                f"the reward server {self.url} wants a secret; set the environment variable {TOKEN} to the "
                f"one that it has{why}"
            )
        if status != 200:
            raise RewardError(f"the reward server {self.url} refused: HTTP {status} {said}".strip())
        if answer is None:
            raise Trouble(f"an answer that is no JSON ({plain(kind) or 'without a type'}, {len(text)} bytes)")
        return answer


def _is_finite(number: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _count(number: Any) -> int | None:
    """What a stranger gave as a number of pixels or images, if it is one."""
    return number if isinstance(number, int) and not isinstance(number, bool) and number > 0 else None


_START = "python -m alignlab.serve_reward reward=NAME"


def _reason(error: BaseException) -> str:
    """The innermost cause, in a few words."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return plain(f"{type(error).__name__}: {error}")


def plain(text: Any, most: int = 300) -> str:
    """What a stranger wrote, on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[:most]).split())
