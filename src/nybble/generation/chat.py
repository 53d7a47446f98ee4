"""Chat over several turns: answers are streamed, adapters can be switched, and one KV cache serves all turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.data import Turn, encode_chat, encode_follow_up, encode_prompt, fixed_clock
from nybble.errors import InputError
from nybble.generation.questions import add_adapters, check_model_settings, form_of
from nybble.hardware import detect_device
from nybble.models import find_artifact, load_artifact
from nybble.run.quiet import quiet_libraries
from nybble.training import Sampling, evaluation_mode, stop_at


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    n_tokens: int
    stopped: bool  # True if the model ended it, False if max_new_tokens or the end of the context did
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The tokens per second after the first token."""
        rest = self.seconds - self.first_token_seconds
        return (self.n_tokens - 1) / rest if self.n_tokens > 1 and rest > 0 else 0.0


class Chat:
    """A conversation with a run, an adapter or a whole model."""

    @quiet_libraries()
    def __init__(
        self,
        tuned: Path | str,
        overrides: Mapping[str, Any] | None = None,
        *,
        others: Sequence[Path | str] = (),
        system: str = "",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        """Load the model and its adapters.

        Args:
            tuned: folder of a run, of an adapter or of a whole model.
            overrides: settings of the model that have changed since the training, such as the place of the base.
            others: runs or adapters of the same base that `use` can switch to.
            system: system text.
            max_new_tokens: limit for the length of a reply, in tokens.
            temperature: sampling temperature; 0 is greedy decoding.
            top_p: draw from the likeliest tokens that have this probability together.
            seed: gives the same answers to the same conversation.

        Raises:
            InputError: a number is out of range, or a folder is neither a run, an adapter nor a model.
            ModelError: a base is missing, or is not the one that was trained on.
        """
        self._sampling = Sampling(temperature, top_p, seed)
        check_model_settings(overrides)
        self._first = find_artifact(str(tuned), overrides)
        more = [find_artifact(str(other), overrides) for other in others]
        self._model, self._tokenizer, self._dtype = load_artifact(self._first, detect_device(self._first.base.device))
        stop_at(self._model, [*self._first.stop_tokens, self._tokenizer.eos_token_id])
        added = add_adapters(self._model, self._first, more)
        self._adapters = {self._first.name: "default"} if self._first.is_adapter else {}
        self._adapters |= {other.name: name for other, name in zip(more, added, strict=True)}
        self._form = form_of(self._first, self._tokenizer)
        self._system = system
        self._max_new_tokens = max_new_tokens
        self._is_on = True
        self._cache: Any = None
        self._cached: list[int] = []  # the tokens whose keys and values are in the cache
        self.reset()

    @property
    def title(self) -> str:
        """What answers, in words."""
        if not self._adapters:
            return self._first.name
        if not self._is_on:
            return f"{self._first.base.model_name_or_path}, without an adapter"
        names = {name: given for given, name in self._adapters.items()}
        return f"{names[self._model.active_adapters[0]]}, an adapter on {self._first.base.model_name_or_path}"

    @property
    def adapters(self) -> list[str]:
        """The adapters that `use` accepts, by the names that the user gave."""
        return list(self._adapters)

    def reset(self, system: str | None = None) -> None:
        """Start a new conversation, with another system text if one is given."""
        self._system = self._system if system is None else system
        self._turns: list[Turn] = []
        self._ids: list[int] = []  # the conversation as the model has seen it
        self._forget()

    def use(self, adapter: str | None) -> None:
        """Continue the conversation with this adapter, or with the base if it is None.

        Raises:
            InputError: there is no such adapter, or the model cannot answer without its adapter.
        """
        if adapter is None and (not self._adapters or self._first.init == "pissa"):
            raise InputError(f"{self._first.name} has no base that could answer without its adapter")
        if adapter is not None and adapter not in self._adapters:
            raise InputError(f"there is no adapter {adapter!r}; allowed: {', '.join(self._adapters) or 'none'}")
        self._is_on = adapter is not None
        if adapter is not None:
            self._model.set_adapter(self._adapters[adapter])
        self._forget()  # keys and values in the cache come from other weights

    def reply(self, question: str, say: Callable[[str], None] = lambda text: None) -> Reply:
        """Answer `question`; `say` is called with each piece of text as soon as it is generated.

        Raises:
            InputError: the conversation has filled the model's context.
        """
        ids = self._asked(question)
        room = self._room(len(ids))
        reuse = self._cached and self._cached == ids[: len(self._cached)] and len(ids) > len(self._cached)
        if not reuse:
            self._forget()
        cache = self._cache
        self._cache = None  # an interrupted reply would leave the cache in an unknown state
        self._cached = []
        stream = _Stream(self._tokenizer, say)
        device = next(self._model.parameters()).device
        off = nullcontext() if self._is_on or not self._adapters else self._model.disable_adapter()
        drawn = self._sampling.drawn(device, turn=len(self._turns))
        with off, evaluation_mode(self._model, self._dtype), drawn:
            produced = self._model.generate(
                input_ids=torch.tensor([ids], device=device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
                past_key_values=cache or self._new_cache(),
                max_new_tokens=room,
                pad_token_id=self._tokenizer.pad_token_id,
                streamer=stream,
                return_dict_in_generate=True,
                **self._sampling.arguments,
            )
        self._cache = produced.past_key_values
        whole = [int(i) for i in produced.sequences[0]]
        self._cached = whole[:-1]  # the model has not processed the last token yet
        stops = self._model.generation_config.eos_token_id
        stopped = whole[-1] in (stops if isinstance(stops, list) else [stops])
        self._ids = whole if stopped else [*whole, self._tokenizer.eos_token_id]
        self._turns += [Turn("user", question), Turn("assistant", stream.text.strip())]
        return Reply(stream.text.strip(), len(whole) - len(ids), stopped, stream.first_seconds, stream.seconds)

    def _asked(self, question: str) -> list[int]:
        if self._form == "template":
            head = [Turn("system", self._system)] if self._system else []
            with fixed_clock(self._first.clock):
                return encode_chat([*head, *self._turns, Turn("user", question)], self._tokenizer)
        if not self._ids:
            return encode_prompt(question, self._tokenizer, self._form, self._system)
        return [*self._ids, *encode_follow_up(question, self._tokenizer, self._form)]

    def _room(self, used: int) -> int:
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        room = self._max_new_tokens if limit is None else min(self._max_new_tokens, limit - used)
        if room <= 0:
            raise InputError(
                f"the conversation has {used:,} tokens, but the model's context has {limit:,}; start a new conversation"
            )
        return room

    def _forget(self) -> None:
        self._cache = None
        self._cached = []

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)


class _Stream:
    """A streamer for transformers' `generate`, which calls it with each token."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._say = say
        self._ids: list[int] = []
        self._is_prompt = True
        self._started = time.monotonic()
        self.text = ""
        self.first_seconds = 0.0
        self.seconds = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then one token at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.seconds = time.monotonic() - self._started
        self.first_seconds = self.first_seconds or self.seconds
        self._ids += value.view(-1).tolist()
        text = self._decoded()
        if not text.endswith("\ufffd"):  # a character may take several tokens
            self._say_rest(text)

    def end(self) -> None:
        """Pass on the text that is still held back."""
        self._say_rest(self._decoded())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()

    def _say_rest(self, text: str) -> None:
        if len(text) > len(self.text):
            self._say(text[len(self.text) :])
            self.text = text
