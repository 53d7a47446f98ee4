"""Whether a server that speaks OpenAI's protocol (vLLM, Ollama, llama-server) answers as the model that was trained.

Prompts are the beginnings of held-out rows, sent as text, so the server's own tokenizer reads them. The
log-probabilities of the first token, and the greedy continuation, are set beside those of the adapter on its base and
those of the base alone: a server that is nearer to the base does not apply the adapter. One question goes through the
server's own chat template, whose number of tokens must be that of the training's.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.data import encode_prompt, fixed_clock
from nybble.errors import CannotRunError, InputError
from nybble.exporting.merging import find_rows, tuned_now
from nybble.hardware import detect_device
from nybble.models import Artifact, find_artifact, load_artifact
from nybble.recipe import EvaluationSection, load_recipe
from nybble.run.record import Observer
from nybble.training import evaluation_mode, generate_answers, stop_at
from nybble.units import format_number

N_PROMPTS = 10
N_NEW_TOKENS = 16
N_TOP = 5  # log-probabilities that vLLM and llama-server give unless they are told otherwise
MOST_DIFFERENCE = 0.5  # nats, mean over prompts: a server's own quantization is allowed
TELLING = 0.02  # nats: where tuned and base are nearer to each other, their answers cannot tell them apart
_QUESTION = "What makes a good chatbot?"
_CANDIDATES = 200  # of our tokens that a server's may be
_SECONDS = 120


@dataclass(frozen=True)
class _Expected:
    """What a model of ours says to the prompts."""

    first: list[dict[str, float]]  # text of a token -> its log-probability, of the likeliest
    answers: list[str]


def check_server(
    url: str, model: str | None, tuned_name: Path | str, overrides: Mapping[str, Any] | None, watch: Observer
) -> dict[str, Any]:
    """Compare the answers of the server at `url` with those of a run, an adapter or a whole model.

    Raises:
        InputError: the address is none, the server does not have the model, or gives no log-probabilities.
        CannotRunError: the server cannot be reached, or refuses.
    """
    server = Server(url, model)
    found, recipe, is_run = _found(Path(tuned_name), overrides, watch)
    with fixed_clock(found.clock):
        compared = find_rows(found, recipe, is_run=is_run, watch=watch)
        watch.stage("reference")
        loaded, tokenizer, dtype = load_artifact(found, detect_device(recipe.model.device))
        stop_at(loaded, found.stop_tokens)
        prompts = [row.prompt_ids or row.input_ids[: len(row.input_ids) // 2] for row in compared.rows]
        prompts = [ids for ids in prompts if ids][:N_PROMPTS]
        tuned = _ask_ours(loaded, tokenizer, dtype, prompts)
        base = None
        if found.is_adapter and found.init != "pissa":
            with loaded.disable_adapter():
                base = _ask_ours(loaded, tokenizer, dtype, prompts)
        form = found.form or ("template" if tokenizer.chat_template else "plain")
        n_tokens = len(encode_prompt(_QUESTION, tokenizer, form)) if form == "template" else None
    del loaded
    watch.stage("server")
    texts = [_without_begin(tokenizer, ids) for ids in prompts]
    replies = [server.complete(text) for text in texts]
    result = {"server": server.url, "model": server.model, **_compare(replies, tuned, base)}
    if n_tokens is not None:
        counted = server.count_chat(_QUESTION)
        result |= {"chat_tokens": counted, "chat_tokens_trained": n_tokens}
        if counted not in (None, n_tokens):
            result["faults"].append(
                f"the server's chat template makes {counted} tokens of a question, the training's {n_tokens}; give the "
                "server the template of the run"
            )
    result["verified"] = not result["faults"]
    return result


def _found(tuned: Path, overrides: Mapping[str, Any] | None, watch: Observer) -> tuple[Artifact, Any, bool]:
    found = find_artifact(str(tuned), overrides)
    if (tuned / "run.json").is_file() or found.is_adapter:
        return tuned_now(tuned, overrides, watch)
    return found, load_recipe(None, overrides), False


@torch.no_grad()
def _ask_ours(model: Any, tokenizer: Any, dtype: torch.dtype, prompts: Sequence[list[int]]) -> _Expected:
    device = next(model.parameters()).device
    first = []
    with evaluation_mode(model, dtype):
        for ids in prompts:
            logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
            first.append(_likeliest(torch.log_softmax(logits.float().cpu(), dim=-1), tokenizer))
    answers = generate_answers(
        model,
        prompts=list(prompts),
        section=EvaluationSection(max_new_tokens=N_NEW_TOKENS),
        compute_dtype=dtype,
        tokenizer=tokenizer,
    )
    return _Expected(first, answers)


def _likeliest(log_probabilities: Tensor, tokenizer: Any) -> dict[str, float]:
    values, tokens = log_probabilities.topk(min(_CANDIDATES, len(log_probabilities)))
    found: dict[str, float] = {}
    for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
        for text in (tokenizer.decode([token]), tokenizer.decode([token]).strip()):  # some servers drop spaces
            found.setdefault(text, value)
    return found


def _without_begin(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text that becomes `ids` once the server has put the begin token before it."""
    alone = tokenizer("").input_ids
    begins = bool(alone) and alone[0] == tokenizer.bos_token_id == ids[0]
    return str(tokenizer.decode(ids[1:] if begins else ids))


def _difference(given: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """Of the probability of the server's tokens, mean absolute difference of logarithms, weighted by the server."""
    least = min(expected.values())
    weights = {text: exp(value) for text, value in given.items()}
    off = {text: abs(value - expected.get(text, expected.get(text.strip(), least))) for text, value in given.items()}
    return sum(weights[text] * off[text] for text in given) / sum(weights.values())


def _compare(replies: Sequence[dict[str, Any]], tuned: _Expected, base: _Expected | None) -> dict[str, Any]:
    def mean(expected: _Expected) -> float:
        pairs = zip(replies, expected.first, strict=True)
        return sum(_difference(reply["first"], ours) for reply, ours in pairs) / len(replies)

    def equal(expected: _Expected) -> int:
        pairs = zip(replies, expected.answers, strict=True)
        return sum(reply["text"].strip() == ours.strip() for reply, ours in pairs)

    result: dict[str, Any] = {"n_prompts": len(replies), "difference": mean(tuned), "equal_answers": equal(tuned)}
    faults = []
    if base is not None:
        result |= {"difference_to_base": mean(base), "equal_to_base": equal(base)}
        pairs = list(zip(tuned.first, base.first, strict=True))
        apart = sum(_difference(dict(list(one.items())[: 2 * N_TOP]), other) for one, other in pairs) / len(pairs)
        result["tuned_beside_base"] = apart
        if result["difference_to_base"] < result["difference"] and apart > TELLING:
            faults.append(
                f"this server answers as the base does (difference {format_number(result['difference_to_base'])}, to "
                f"the tuned model {format_number(result['difference'])}): the adapter is not applied"
            )
    if not faults and not result["difference"] <= MOST_DIFFERENCE:
        faults.append(
            f"log-probabilities of first tokens differ by {format_number(result['difference'])} on average; allowed "
            f"is {MOST_DIFFERENCE:g}"
        )
    return {**result, "faults": faults}


class Server:
    """An OpenAI-compatible endpoint, and the model there that is asked."""

    def __init__(self, url: str, model: str | None) -> None:
        """Find the model: the one that is named, or the only one.

        Raises:
            InputError: `url` is no address, or the server has no such model, or several.
            CannotRunError: it cannot be reached.
        """
        if not url.startswith(("http://", "https://")):
            raise InputError(f"got {url!r}; give an address such as http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/") if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
        known = [one["id"] for one in self._get("/models").get("data") or []]
        if model is None and len(known) != 1:
            raise InputError(f"{self.url} serves {', '.join(known) or 'no model'}; name one with --server_model")
        if model is not None and model not in known:
            near = get_close_matches(model, known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"{self.url} has no model {model!r}; {meant}it serves {', '.join(known) or 'none'}")
        self.model = model or known[0]

    def complete(self, prompt: str) -> dict[str, Any]:
        """The greedy continuation, and the log-probabilities of its first token by text.

        Raises:
            InputError: there are no log-probabilities.
        """
        asked = {"model": self.model, "prompt": prompt, "max_tokens": N_NEW_TOKENS, "temperature": 0, "logprobs": N_TOP}
        choice = self._post("/completions", asked)["choices"][0]
        first = _first_token(choice.get("logprobs"))
        if not first:
            raise InputError(
                f"{self.url} answers without log-probabilities, so nothing can be compared; turn them on there, or use "
                "a server that gives them (vLLM, llama-server)"
            )
        return {"text": choice["text"], "first": first}

    def count_chat(self, question: str) -> int | None:
        """The number of tokens of a question in the server's template."""
        asked = {"model": self.model, "messages": [{"role": "user", "content": question}], "max_tokens": 1}
        count = (self._post("/chat/completions", asked).get("usage") or {}).get("prompt_tokens")
        return None if count is None else int(count)

    def _get(self, path: str) -> dict[str, Any]:
        return self._send(urllib.request.Request(self.url + path))  # noqa: S310 - http, as checked

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(self.url + path, data, headers))  # noqa: S310 - http, as checked

    def _send(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as reply:  # noqa: S310 - http, as checked
                read = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            said = error.read(300).decode("utf-8", "replace").strip()
            raise CannotRunError(f"{request.full_url} answers {error.code}: {said or error.reason}") from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise CannotRunError(f"{request.full_url} cannot be reached ({reason}); start the server") from error
        except ValueError as error:
            raise CannotRunError(f"{request.full_url} does not answer in JSON; give the address of its API") from error
        if not isinstance(read, dict):
            raise CannotRunError(f"{request.full_url} does not answer as OpenAI's protocol says")
        return read


def _first_token(logprobs: Any) -> dict[str, float]:
    """Text -> log-probability of the likeliest first tokens, in either of the two forms that servers use."""
    if not isinstance(logprobs, dict):
        return {}
    if logprobs.get("top_logprobs"):
        return {text: float(value) for text, value in logprobs["top_logprobs"][0].items()}
    content = logprobs.get("content") or []
    top = (content[0].get("top_logprobs") or content[:1]) if content else []
    return {one["token"]: float(one["logprob"]) for one in top}
