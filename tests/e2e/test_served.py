"""`nybble export --check URL`: a server on loopback that runs stock transformers, and what is wrong with others."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.bundled import base_path
from nybble.exporting.served import _first_token


class Endpoint(ThreadingHTTPServer):
    """OpenAI's protocol, as much of it as is asked: a model under a name, with log-probabilities if it `tells` them."""

    def __init__(self, model: Any, tokenizer: Any, *, tells: bool = True, more_chat_tokens: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.tells, self.more = model, tokenizer, tells, more_chat_tokens
        self.names = ["mine"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_GET(self) -> None:
        self.reply({"data": [{"id": name} for name in self.server.names]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokenizer = self.server.tokenizer
        if self.path == "/v1/chat/completions":
            ids = tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True, return_dict=False)
            return self.reply({"choices": [], "usage": {"prompt_tokens": len(ids) + self.server.more}})
        ids = torch.tensor([tokenizer(asked["prompt"]).input_ids])
        with torch.no_grad():
            likely = torch.log_softmax(self.server.model(input_ids=ids).logits[0, -1].float(), -1)
            made = self.server.model.generate(input_ids=ids, max_new_tokens=asked["max_tokens"], do_sample=False)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        values, tokens = likely.topk(asked["logprobs"])
        top = {tokenizer.decode([token]): value for token, value in zip(tokens.tolist(), values.tolist(), strict=True)}
        given = {"top_logprobs": [top]} if self.server.tells else None
        return self.reply({"choices": [{"text": text, "logprobs": given}]})

    def reply(self, content: Any) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[..., Endpoint]]:
    """`served(model, **settings)` -> a server that runs in a thread."""
    running = []

    def start(model: Any, **settings: Any) -> Endpoint:
        server = Endpoint(model, AutoTokenizer.from_pretrained(base_path()), **settings)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def stock(adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that changes what is said."""
    torch.manual_seed(0)
    model = get_peft_model(stock(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_server_with_and_without_the_adapter(
    nybble: Callable[..., Any], served: Callable[..., Endpoint], adapter: Path
) -> None:
    asked = ["export", adapter, "--model_name_or_path", base_path(), "--device", "cpu", "--check"]
    with_adapter = nybble(*asked, served(stock(adapter)).url, "--json")
    assert with_adapter.code == 0, (with_adapter.err, with_adapter.out)
    found = with_adapter.json["check"]
    assert found["difference"] < 0.1 < found["difference_to_base"]
    assert found["equal_answers"] > found["n_prompts"] / 2

    without = nybble(*asked, served(stock()).url)
    assert without.code == 1
    assert "this server answers as the base does" in without.out
    assert "the adapter is not applied" in without.out


def test_servers_that_cannot_be_compared_are_refused_in_a_line(
    nybble: Callable[..., Any], served: Callable[..., Endpoint]
) -> None:
    silent = served(None)
    for arguments, code, words in (
        (["--check", "127.0.0.1:8000"], 2, "give an address such as http"),
        (["--check", "http://127.0.0.1:9/v1"], 3, "cannot be reached"),
        (["--check", silent.url, "--server_model", "mime"], 2, "has no model 'mime'; did you mean mine?"),
        (["--server_model", "mine", "--hub", "a/b"], 2, "goes with --check"),
        (["--check", "llama.cpp", "--hub", "a/b"], 2, "give --gguf FILE"),
        (["--check", silent.url, "--gguf", "new.gguf"], 2, "a server is checked without --gguf"),
    ):
        done = nybble("export", base_path(), *arguments)
        assert (done.code, words in done.err) == (code, True), done.err
        assert done.err.count("\n") == 1
    silent.names = ["mine", "other"]
    done = nybble("export", base_path(), "--check", silent.url)
    assert (done.code, "name one with --server_model" in done.err) == (2, True)


def test_a_server_that_tells_no_log_probabilities_or_has_another_template(
    nybble: Callable[..., Any], served: Callable[..., Endpoint]
) -> None:
    done = nybble("export", base_path(), "--check", served(stock(), tells=False).url)
    assert (done.code, "answers without log-probabilities" in done.err) == (2, True), done.err
    done = nybble("export", base_path(), "--check", served(stock(), more_chat_tokens=3).url)
    assert (done.code, "chat template makes" in done.out) == (1, True), done.out


def test_both_forms_of_log_probabilities_are_read() -> None:
    top = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]
    assert _first_token({"content": [{"token": "a", "logprob": -0.5, "top_logprobs": top}]}) == {"a": -0.5, "b": -1.0}
    assert _first_token({"content": [{"token": "a", "logprob": -0.5}]}) == {"a": -0.5}
    assert _first_token({"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}) == {"a": -0.5}
    assert _first_token(None) == _first_token({"content": []}) == {}
