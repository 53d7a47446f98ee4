"""Arms, figures and verdict, from run directories written by hand."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from nybble.comparison import compare
from nybble.comparison.arms import ArmPlan, arms_of_methods, arms_of_objectives, arms_of_recipes, check_folder
from nybble.comparison.child import TrialEnding, is_done, run_trial
from nybble.comparison.figures import collect
from nybble.comparison.verdict import verdict
from nybble.errors import InputError, RecipeError, StoppedError
from nybble.recipe import Recipe, load_recipe, save_recipe
from nybble.run.directory import RunDirectory
from nybble.run.record import Evaluation, Phase, RowLoss, RunRecord, Silent


def recipe(**settings: Any) -> Recipe:
    return load_recipe(None, {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", **settings})


def methods(folder: Path, *words: str, seeds: int = 1, **settings: Any) -> list[ArmPlan]:
    return arms_of_methods(recipe(**settings), words, seeds, folder)


def write_run(plan: ArmPlan, losses: list[float], *, seed: int = 0, status: str = "done", **changes: Any) -> None:
    """A finished run: one row for each loss, of 10 learned tokens."""
    trial = plan.trials[seed]
    run = RunDirectory(trial.run_dir)
    run.create()
    rows = tuple(RowLoss(i + 1, 10, 10 * loss, i % 2 == 0) for i, loss in enumerate(losses))
    mean = sum(losses) / len(losses)
    base = Evaluation(5.0, 148.4, len(losses), 100, 0.0, 1.0, rows=rows)
    tuned = Evaluation(mean, 2.0, len(losses), 100, 0.5, 1.0, rows=rows)
    values: dict[str, Any] = {
        "status": status,
        "recipe": trial.recipe.model_dump(mode="json"),
        "versions": {"torch": "2.13"},
        "device": {"name": "a CPU"},
        "rows": {"ledger": {}, "sha256": "same"},
        "plan": {},
        "model": {"packed_bytes": 4127, "packed_elements": 8000},
        "started": "2026-01-01T00:00:00+00:00",
        "phases": {"train": Phase(8_000_000, 9_000_000, 75.0)},
        "trainable_parameters": 10,
        "total_parameters": 100,
        "peak_bytes": 9_000_000,
        "tokens_per_second": 1000.0,
        "train_loss": 1.5,
        "evaluation_base": base,
        "evaluation_tuned": tuned,
        "eval_loss": mean,
    }
    run.write_record(RunRecord(**{**values, **changes}))
    run.write_held_out(base, tuned)


LOSSES = [1.0, 1.2, 0.8, 1.1, 0.9, 1.3, 0.7, 1.0]


def test_each_kind_of_training_has_its_own_rate(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora", "lora", "full", learning_rate=2e-4)
    assert [plan.recipe.training.learning_rate for plan in plans] == pytest.approx([2e-4, 2e-4, 2e-5])
    assert "tenth" in plans[2].rate_source
    back = methods(tmp_path, "qlora", "full", learning_rate=2e-5, method="full")
    assert [plan.recipe.training.learning_rate for plan in back] == pytest.approx([2e-4, 2e-5])
    given = methods(tmp_path, "lora=1e-3", "full=probe")
    assert [plan.recipe.training.learning_rate for plan in given] == [1e-3, "probe"]
    probed = methods(tmp_path, "lora", "full", learning_rate="probe")
    assert [plan.recipe.training.learning_rate for plan in probed] == ["probe", "probe"]


def test_nothing_else_differs_between_the_arms(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora", "lora", "full", push_to_hub=True, hub_model_id="a/b", init_lora_weights="qera")
    recipes = [plan.trials[0].recipe for plan in plans]
    for one in recipes:
        same = {"output_dir", "learning_rate"}
        assert one.training.model_dump(exclude=same) == recipes[0].training.model_dump(exclude=same)
        assert (one.data, one.evaluation, one.model) == (recipes[0].data, recipes[0].evaluation, recipes[0].model)
        assert one.training.push_to_hub is False
    assert [one.lora.init_lora_weights for one in recipes] == ["qera", "default", "default"]


def test_seeds_are_runs_of_their_own(tmp_path: Path) -> None:
    (plan,) = methods(tmp_path, "qlora", seeds=3, seed=7)
    assert [trial.recipe.training.seed for trial in plan.trials] == [7, 8, 9]
    assert len({trial.run_dir for trial in plan.trials}) == 3
    assert {trial.recipe.data.eval_seed for trial in plan.trials} == {7}  # judged on the same rows
    (given,) = methods(tmp_path, "qlora", seeds=2, eval_seed=3)
    assert {trial.recipe.data.eval_seed for trial in given.trials} == {3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "unknown method 'nonsense'; allowed: qlora, lora, full"),
        (["lora", "lora=1"], "named twice"),
        (["full=fast"], "learning_rate"),
        (["full=-1"], "learning_rate"),
    ],
)
def test_wrong_methods_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        methods(tmp_path, *words)


def test_recipes_are_called_by_their_files(tmp_path: Path) -> None:
    files = [tmp_path / "x" / "a.yaml", tmp_path / "y" / "a.yaml", tmp_path / "b.yaml"]
    for number, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        file.write_text(save_recipe(recipe(r=number + 1)))
    plans = arms_of_recipes(files, {"max_steps": 9}, 1, tmp_path / "out")
    assert [plan.name for plan in plans] == ["a", "a-2", "b"]
    assert [(p.recipe.lora.r, p.recipe.training.max_steps) for p in plans] == [(1, 9), (2, 9), (3, 9)]


def begin(folder: Path, plans: list[ArmPlan]) -> None:
    (folder / "recipes").mkdir(parents=True)
    (folder / "comparison.json").write_text("{}")
    for plan in plans:
        plan.trials[0].recipe_file.write_text(save_recipe(plan.trials[0].recipe))


def test_a_folder_of_the_same_recipe_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    check_folder(folder, methods(folder, "qlora"))
    begin(folder, methods(folder, "qlora"))
    check_folder(folder, methods(folder, "qlora"))
    check_folder(folder, methods(folder, "qlora", "full"))  # an arm more


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    begin(folder, methods(folder, "qlora"))
    with pytest.raises(InputError, match="another recipe: r: 16 there, r: 3 here"):
        check_folder(folder, methods(folder, "qlora", r=3))
    with pytest.raises(InputError, match="another recipe"):
        check_folder(folder, methods(folder, "full"))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("x")
    with pytest.raises(InputError, match="something other than a comparison"):
        check_folder(tmp_path, methods(tmp_path, "qlora"))


def test_what_is_the_same_is_within_noise(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora", "lora")
    write_run(plans[0], [loss + 0.01 * (-1) ** i for i, loss in enumerate(LOSSES)], peak_bytes=4_000_000)
    write_run(plans[1], LOSSES)
    found = collect(tmp_path, plans, {})
    (difference,) = found.differences
    assert difference.loss.value == pytest.approx(0.0, abs=1e-9)
    text = verdict(found)
    assert "is within noise" in text
    assert "worse" not in text
    assert "do not differ by more than noise, qlora takes the least memory" in text
    assert "On 8 held-out rows" in text
    assert "--seeds 3" in text


def test_what_is_worse_on_every_row_is_worse(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora", "lora")
    write_run(plans[0], [loss + 0.1 + 0.001 * i for i, loss in enumerate(LOSSES)])
    write_run(plans[1], LOSSES)
    text = verdict(collect(tmp_path, plans, {}))
    assert "lora has the lowest loss, 1.0000" in text
    assert "qlora (1.1035) is worse by more than noise: +0.1035" in text
    assert "Answered exactly: lora 50.0 %; qlora 50.0 %, within noise." in text


def test_seeds_are_averaged_and_their_noise_counts(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora", "lora", seeds=2)
    for seed, shift in enumerate((0.1, -0.06)):
        write_run(plans[0], [loss + shift for loss in LOSSES], seed=seed, tokens_per_second=1000.0 + 200 * seed)
        write_run(plans[1], LOSSES, seed=seed)
    found = collect(tmp_path, plans, {})
    assert found.arms[0].eval_loss == pytest.approx(1.02)
    assert found.arms[0].tokens_per_second == 1100
    assert found.differences[0].loss.within_noise  # 0.1 worse with one seed, 0.06 better with the other
    assert "of 2 seeds" in verdict(found)


def test_different_rows_are_not_held_against_each_other(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora", "lora")
    write_run(plans[0], LOSSES)
    write_run(plans[1], LOSSES, rows={"ledger": {}, "sha256": "others"})
    found = collect(tmp_path, plans, {})
    assert found.differences == ()
    assert not found.same_rows
    assert "different rows" in verdict(found)


def test_without_held_out_rows_only_costs_are_told(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora", "lora")
    for plan, peak in zip(plans, (5_000_000, 9_000_000), strict=True):
        write_run(plan, LOSSES, evaluation_base=None, evaluation_tuned=None, eval_loss=None, peak_bytes=peak)
        (plan.trials[0].run_dir / "held_out.jsonl").unlink()
    found = collect(tmp_path, plans, {})
    assert found.arms[0].eval_loss is None
    text = verdict(found)
    assert "No rows were held out" in text
    assert "qlora peaks at 5.00 MB of memory, lora at 9.00 MB" in text


def test_arms_that_crashed_or_do_not_fit_are_told_and_the_others_kept(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora", "lora", "full")
    write_run(plans[0], LOSSES)
    endings = {
        plans[1].trials[0].run_dir: TrialEnding(1, "boom"),
        plans[2].trials[0].run_dir: TrialEnding(3, "needs 128 GB"),
    }
    found = collect(tmp_path, plans, endings)
    assert [arm.status for arm in found.arms] == ["done", "failed", "does not fit"]
    assert [arm.measured for arm in found.arms] == [True, False, False]
    text = verdict(found)
    assert "lora failed (boom)." in text
    assert "full does not fit here and was not run (needs 128 GB)." in text
    assert "Only qlora has been measured" in text


def test_a_run_that_is_not_done_is_not_measured(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora")
    write_run(plans[0], LOSSES, status="stopped")
    assert not is_done(plans[0].trials[0])
    assert collect(tmp_path, plans, {}).arms[0].measured is False
    assert "No arm has been measured" in verdict(collect(tmp_path, plans, {}))


def test_a_probed_rate_is_the_one_that_was_trained_with(tmp_path: Path) -> None:
    plans = methods(tmp_path, "qlora=probe")
    write_run(plans[0], LOSSES, probe={"learning_rate": 1e-3})
    assert collect(tmp_path, plans, {}).arms[0].learning_rates == (1e-3,)


class FakeTrain:
    """Puts a script in the place of `python`, which gets the words that the child would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
        program = folder / "python"
        program.write_text(f"#!{sys.executable}\nimport json, os, signal, sys, time\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr("nybble.subprocesses.sys.executable", str(program))


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        ("sys.exit(0)", 0, None),
        ("print('a', file=sys.stderr); print('no such rows', file=sys.stderr); sys.exit(2)", 2, "no such rows"),
        (
            "print('nybble: in other words', file=sys.stderr)\n"
            "error = {'class': 'RowsError', 'message': 'no such rows'}\n"
            "open(os.environ['NYBBLE_ERROR_FILE'], 'w').write(json.dumps(error))\n"
            "sys.exit(2)",
            2,
            "no such rows",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "killed by SIGKILL (out of memory?)"),
        ("sys.exit(7)", 7, "ended with exit code 7"),
    ],
)
def test_how_a_run_ended_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, code: int, reason: str | None
) -> None:
    FakeTrain(monkeypatch, tmp_path, script)
    (plan,) = methods(tmp_path / "c", "qlora")
    ending = run_trial(plan.trials[0], tmp_path / "log", Silent())
    assert (ending.code, ending.error) == (code, reason)
    assert ending.error_class == ("RowsError" if "RowsError" in script else "NybbleError")


@pytest.mark.parametrize(("has", "flag"), [("checkpoint", "--resume"), ("run.json", "--overwrite"), ("", "")])
def test_an_unfinished_run_goes_on_or_begins_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has: str, flag: str
) -> None:
    FakeTrain(monkeypatch, tmp_path, "print(' '.join(sys.argv[1:]), file=sys.stderr)")
    (plan,) = methods(tmp_path / "c", "qlora")
    folder = plan.trials[0].run_dir
    folder.mkdir(parents=True)
    if has == "checkpoint":
        (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    elif has:
        (folder / has).write_text("{}")
    run_trial(plan.trials[0], tmp_path / "log", Silent())
    assert (tmp_path / "log").read_text().strip() == f"-m nybble train {plan.trials[0].recipe_file} {flag}".strip()


def test_a_signal_is_handed_on_once_and_stops_the_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeTrain(
        monkeypatch,
        tmp_path,
        "signal.signal(signal.SIGINT, lambda *_: (print('saved', file=sys.stderr), sys.exit(4)))\n"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(30); sys.exit(0)",
    )
    (plan,) = methods(tmp_path / "c", "qlora")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="the same command again"):
        run_trial(plan.trials[0], tmp_path / "log", Silent())
    assert (tmp_path / "log").read_text() == "saved\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_objectives_are_arms_of_the_same_rows(tmp_path: Path) -> None:
    pairs = recipe(objective="dpo", beta=0.3)
    plans = arms_of_objectives(pairs, ["sft", "dpo=5e-6", "orpo"], seeds=1, folder=tmp_path)
    assert [plan.name for plan in plans] == ["sft", "dpo", "orpo"]
    assert [plan.recipe.preferences.objective for plan in plans] == ["sft", "dpo", "orpo"]
    assert [plan.recipe.data.data_format for plan in plans] == ["preference", "auto", "auto"]
    assert [plan.recipe.training.learning_rate for plan in plans][1] == 5e-6
    assert all(plan.recipe.preferences.beta == 0.3 for plan in plans)
    with pytest.raises(RecipeError, match=r"--objectives: unknown objective 'ppo'; allowed: sft, dpo, ipo, kto, orpo"):
        arms_of_objectives(pairs, ["ppo"], seeds=1, folder=tmp_path)
    with pytest.raises(RecipeError, match=r"--objectives: dpo is named twice"):
        arms_of_objectives(pairs, ["dpo", "dpo=1e-3"], seeds=1, folder=tmp_path)
    with pytest.raises(InputError, match=r"--methods and --objectives each make arms of one recipe; give one of them"):
        compare([], {"model_name_or_path": "a"}, methods=["lora"], objectives=["dpo"], out=tmp_path)
    with pytest.raises(InputError, match=r"--objectives needs one recipe, 2 were given"):
        compare(["a.yaml", "b.yaml"], {"model_name_or_path": "a"}, objectives=["dpo"], out=tmp_path)
