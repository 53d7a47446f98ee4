"""What every test shares: the data folder, a tiny model made on the spot, a fixed seed, the tiers, the closing line.

Tests run in several processes (pytest-xdist). What one of them measures of this machine serves all: see `machine`.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub at import: no test may reach the network
# Tensors here are tiny. On cores that are shared, two threads that wait for each other are a hundred times slower; read
# by torch at import, in the processes that tests start as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import string
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nybble.kernels import dispatcher
from nybble.kernels.library import load_library

torch.set_num_threads(1)

# Families of tests that the oldest transformers lacks.
LATER_FAMILIES = ("internlm3", "lfm3", "nemotron_h_omni", "mistral_large4", "hyperclovax_vision_v2", "granite_docling")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
CORPUS = (
    "Once upon a time there was a small model in four bits.",
    "The cat sat on the mat, and the dog sat on the cat.",
    "What is two plus two? Two plus two is four.",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_is_chosen() -> Iterator[None]:
    """The backends that a former test's training chose are not this one's."""
    yield
    dispatcher.forget_choices()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of this test run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def machine(run_folder: Path) -> Callable[[Path], AbstractContextManager[None]]:
    """`with machine(cache):` the cache folder knows what the tests before measured of this machine, and nothing else.

    The device's rates and the backends that compute correctly take seconds to find; they are found once in a test run.
    """
    kept = run_folder / "machine"
    (kept / "paths").mkdir(parents=True, exist_ok=True)
    rates = kept / "devices.json"

    @contextmanager
    def known(cache: Path) -> Iterator[None]:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "paths").symlink_to(kept / "paths")
        found = cache / rates.name
        if rates.exists():
            shutil.copyfile(rates, found)
        yield
        if found.exists() and not (rates.exists() and found.read_bytes() == rates.read_bytes()):
            partial = kept / f"rates-{os.getpid()}"
            shutil.copyfile(found, partial)
            partial.replace(rates)

    return known


@pytest.fixture(scope="session", autouse=True)
def _no_cache_outside(
    tmp_path_factory: pytest.TempPathFactory, machine: Callable[[Path], AbstractContextManager[None]]
) -> Iterator[None]:
    """What fixtures of modules train or plan writes to no user's cache."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, machine(cache):
        patch.setenv("NYBBLE_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Models, rows and golden slices that are not part of the repository."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("NYBBLE_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("shared data folder is absent (set NYBBLE_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_llama(dtype, tied, **config)` -> folder of a random Llama and its tokenizer; made once: do not write."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(dtype: torch.dtype = torch.float32, tied: bool = False, **config: Any) -> Path:
        key = (dtype, tied, *sorted(config.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny_llama")
            _write_llama(made[key], dtype, tied, config)
        return made[key]

    return make


def _write_llama(folder: Path, dtype: torch.dtype, tied: bool, changes: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        # Larger than Llama's 0.02: logits of order 1 let a wrong weight show.
        "initializer_range": 0.1,
    }
    config = LlamaConfig(
        **{**sizes, **changes}, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    _write_tokenizer(folder, config.vocab_size)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    unk, bos, eos, pad = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE(unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )
    fast.save_pretrained(folder)


# Tests marked so are deselected unless `--all` is given or their name is.
NIGHTLY = "nightly"
ALL = "left to make test-all"
_deselected = pytest.StashKey[Counter[str]]()


def pytest_configure() -> None:
    """A library built from other sources would be passed over for torch, and what fails then misleads."""
    try:
        load_library()
    except FileNotFoundError:
        return  # the machine has no C compiler
    except OSError as error:
        pytest.exit(f"{error}; make install does", returncode=3)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked nightly as well (make test-all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip families that this transformers lacks; leave the long matrix to `make test-all`, unless it is asked for."""
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if family in LATER_FAMILIES and family not in CONFIG_MAPPING:
            item.add_marker(pytest.mark.skip(reason=f"transformers {transformers.__version__} has no {family}"))
    named = any("::" in argument for argument in config.args) or NIGHTLY in config.option.markexpr
    if config.getoption("--all") or named:
        return
    left = [item for item in items if item.get_closest_marker(NIGHTLY)]
    if left:
        items[:] = [item for item in items if not item.get_closest_marker(NIGHTLY)]
        config.hook.pytest_deselected(items=left)


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        counts = items[0].config.stash.setdefault(_deselected, Counter())
        counts.update(ALL if item.get_closest_marker(NIGHTLY) else "deselected" for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells what it deselected; every worker collects the same tests."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deselected"] = dict(session.config.stash.get(_deselected, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    counts = Counter(getattr(node, "workeroutput", {}).get("deselected", {}))
    node.config.stash[_deselected] = node.config.stash.get(_deselected, Counter()) | counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One closing line: what did not run, and why."""
    reasons = Counter(terminalreporter.config.stash.get(_deselected, Counter()))
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple | list) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"Not run: {sum(reasons.values())} tests ({listed})")
    else:
        terminalreporter.write_line("Not run: nothing was skipped or deselected")
