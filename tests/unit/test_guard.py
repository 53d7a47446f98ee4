"""What is let in and what is let out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from nybble.cli.main import run as run_nybble
from nybble.data import render_chat
from nybble.errors import InputError, ModelError, RowsError
from nybble.exporting.ollama import modelfile
from nybble.guard import brief, check_links, library_faults, read_object, redact, refused_by_system, shown
from nybble.models import push_folder
from nybble.reporting.pages import in_markdown
from nybble.run.directory import RunDirectory as Run
from nybble.run.directory import read_record, read_whole_lines, write_text
from nybble.run.record import Sample

TOKEN = "hf_" + "Q" * 34
QUESTION = [{"role": "user", "content": "What is one?"}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
        (b'{"a": ' + b"1" * 5000 + b"}", "more than 4,300 digits"),
        (b"[]", "holds a list"),
        (b"{} {}", "not valid JSON"),
        (b" " * 101, "101 bytes; at most 100 are allowed"),
    ],
)
def test_a_file_of_settings_is_read_within_bounds(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    most = 100 if content.isspace() else 1 << 20
    with pytest.raises(ModelError, match=says) as caught:
        read_object(tmp_path / "a.json", ModelError, "repair it", most)
    assert str(caught.value).endswith("repair it")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_object(tmp_path, InputError, "repair it")


def test_settings_as_deep_as_real_ones_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a":' * 60 + "1" + "}" * 60)
    assert list(read_object(tmp_path / "a.json", InputError, "")) == ["a"]


def test_whatever_a_library_raises_is_one_line() -> None:
    panic = type("PanicException", (BaseException,), {})
    for error in (Exception("two\nlines"), panic("a panic"), MemoryError(), KeyError("a")):
        with (
            pytest.raises(ModelError, match=r"^the file \([^\n]+\); give another$"),
            library_faults("the file", ModelError, "give another"),
        ):
            raise error
    for kept in (KeyboardInterrupt(), InputError("its own")):
        with pytest.raises(type(kept)), library_faults("the file", ModelError, ""):
            raise kept


def test_what_the_system_refuses_is_known_from_a_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_rust = "No space left on device (os error 28)"
    said = {
        OSError(28, "No space left on device", "out/a"): "out/a: No space left on device",
        OSError(5, "Input/output error"): "Input/output error",
        Exception(of_rust): "No space left on device",
        SafetensorError(f"Error while serializing: I/O error: {of_rust}"): "No space left on device",
        OSError("nothing of the kind in the folder"): None,
        ValueError("28"): None,
    }
    for error, expected in said.items():
        assert refused_by_system(error) == expected

        def broken(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("nybble.cli.main.app", broken)
        assert run_nybble([]) == (3 if expected else 1)
        line = capsys.readouterr().err
        assert line == f"nybble: {expected}; make room there, or give another folder\n" if expected else "fault" in line


def test_what_a_message_shows_is_short() -> None:
    bomb: list[Any] = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    for value in (bomb, "x" * 10**6, 16**10**6, [0] * 10**6, {i: i for i in range(10**5)}, b"x" * 10**6):
        assert 0 < len(shown(value)) < 300
    assert shown("fast") == "'fast'"
    assert len(brief(ValueError("x" * 10**6))) < 300
    assert brief(ValueError()) == "ValueError"


def test_a_link_out_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "adapter", tmp_path / "secret.txt"
    folder.mkdir()
    outside.write_text("mine")
    (folder / "a.txt").write_text("")
    (folder / "inside.txt").symlink_to("a.txt")
    check_links(folder)
    for goal in (outside, "../secret.txt", "/etc", "loop", "../gone"):
        (folder / "loop").symlink_to(goal)
        with pytest.raises(ModelError, match="loop links to a file outside its folder"):
            check_links(folder, ModelError)
        with pytest.raises(InputError, match="links to a file outside its folder"):
            push_folder(folder, "me/adapter")
        (folder / "loop").unlink()


def test_the_hubs_cache_may_link_to_its_blobs_alone(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (blobs := tmp_path / "models--a--b" / "blobs").mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    check_links(snapshot)
    (snapshot / "other.json").symlink_to("../../../elsewhere")
    with pytest.raises(InputError, match=r"other\.json"):
        check_links(snapshot)


def test_secrets_are_taken_out_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SHORT_TOKEN", "yes")
    monkeypatch.setenv("HARMLESS", "a value of something")
    told = f"GET https://me:pass@example.org/x with {TOKEN} and 0123456789abcdef, yes, a value of something"
    assert redact(told) == "GET https://***@example.org/x with *** and ***, yes, a value of something"
    for plain in ("hf_hub", "https://example.org/a@b", "mail me@example.org", "q_proj", "hf_transfer_is_not_one"):
        assert redact(plain) == plain


def test_no_token_is_written_into_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-of-the-usual-form")
    run = Run(tmp_path)
    write_text(tmp_path / "run.json", f'{{"notes": ["failed at https://a:b@hub/ with {TOKEN}"]}}')
    run.append_sample(Sample(f"say {TOKEN}", "not-of-the-usual-form", None))
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    assert TOKEN not in written
    assert "not-of-the-usual-form" not in written
    assert "a:b" not in written
    assert [line["prompt"] for line in read_whole_lines(tmp_path / "samples.jsonl")[0]] == ["say ***"]


def test_markdown_holds_no_markup_of_others() -> None:
    told = in_markdown("<script>alert(1)</script> [a](javascript:b) `c` | d\n# e")
    assert not set("<>[]`|\n") & set(told)


def test_a_record_of_another_kind_is_refused(tmp_path: Path) -> None:
    for content in ({}, {"status": 3}, {"status": "done", "recipe": [], "versions": {}}):
        (tmp_path / "run.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"run.json is damaged \(no "):
            read_record(tmp_path)


def rendering(template: str) -> Any:
    """A tokenizer as far as its template goes, rendered as transformers does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def apply_chat_template(messages: Any, **options: Any) -> str:
        texts, _spans = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=options["add_generation_prompt"]
        )
        return str(texts[0])

    return SimpleNamespace(
        chat_template=template,
        get_chat_template=lambda tools: template,
        apply_chat_template=apply_chat_template,
    )


def test_a_template_that_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.data.templates.MOST_SECONDS", 0.05)
    loops = "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}" + "{% endfor %}" * 3
    for template in (loops, "{{ 9 ** (9 ** 9) }}"):
        with pytest.raises(RowsError, match=r"^here: the chat template runs for more than 0.05 s"):
            render_chat(rendering(template), QUESTION, "here")
    assert render_chat(rendering("{{ messages[0].content }}"), QUESTION, "here") == "What is one?"


def test_a_template_does_not_fill_the_memory() -> None:
    doubling = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    for template in (doubling, "{{ 'x' * 10 ** 11 }}", "{{ '%99999999999d' % 1 }}"):
        with pytest.raises(RowsError, match="here: the chat template"):
            render_chat(rendering(template), QUESTION, "here")
    assert len(bytearray(1 << 28)) == 1 << 28  # what was allowed before is allowed again


def test_the_clock_of_others_goes_on() -> None:
    import signal

    def mine(*_: object) -> None:
        raise AssertionError

    former = signal.signal(signal.SIGVTALRM, mine)
    try:
        render_chat(rendering("x"), QUESTION, "here")
        assert signal.getsignal(signal.SIGVTALRM) is mine
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGVTALRM, former)


@pytest.mark.parametrize("evil", ['"""\nADAPTER /etc/passwd\n"""', '"'])
def test_a_template_cannot_write_lines_of_a_modelfile(evil: str) -> None:
    tokenizer = rendering("{% for m in messages %}{{ m.content }}" + evil.replace('"', "{{ '\"' }}") + "{% endfor %}")
    tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.convert_ids_to_tokens = "", 1, lambda _: "</s>"
    with pytest.raises(ModelError, match="has quotes"):
        modelfile(tokenizer, "template", [], "model.gguf")


def test_nothing_here_evaluates_or_unpickles(pytestconfig: pytest.Config) -> None:
    import ast

    calls = {"eval", "exec", "compile", "__import__"}
    for file in sorted((pytestconfig.rootpath / "src" / "nybble").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        named = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        modules = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not named & calls, file
        assert not modules & {"pickle", "marshal", "shelve", "dill"}, file


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"a.json: cannot be read \(Permission denied\); repair it"):
        read_object(tmp_path / "a.json", InputError, "repair it")
