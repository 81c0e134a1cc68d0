"""Bad input through the command line: one line that says what was found, where, and what to do; nothing half written."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppomax.cli import main
from ppomax.models.embedded import embedded_directory
from stages import toy
from stages.conftest import Toys, Trained
from stages.toy import file_hashes, metrics, prompt_rows, write_rows

FLAGS = ["--compute.dtype", "float32", "--compute.device", "cpu", "--save.every", "100"]
Said = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command that must be refused; returns what it said, in one line. Its run directory must not exist."""

    def run(words: list[str], code: int = 2) -> str:
        assert main(words) == code
        said = " ".join(capsys.readouterr().err.split())
        assert "error: " in said
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists()
        return said.partition("error: ")[2]

    return run


@pytest.fixture
def sft(tmp_path: Path, toys: Toys) -> Callable[..., list[str]]:
    """The words of a short SFT run."""

    def words(**changes: str) -> list[str]:
        settings = {
            "run-dir": str(tmp_path / "run"),
            "model": "tiny",
            "data": toys.dialogues,
            "epochs": "0.1",
            **changes,
        }
        return ["sft", *(word for name, value in settings.items() for word in (f"--{name}", *value.split())), *FLAGS]

    return words


@pytest.fixture
def reward(tmp_path: Path, toys: Toys, trained: Trained) -> Callable[..., list[str]]:
    """The words of a short reward-model run."""

    def words(**changes: str) -> list[str]:
        settings = {
            "run-dir": str(tmp_path / "run"),
            "model": trained.sft,
            "data": toys.pairs,
            "max-steps": "1",
            **changes,
        }
        return ["reward", *(word for name, value in settings.items() for word in (f"--{name}", *value.split())), *FLAGS]

    return words


@pytest.fixture
def ppo(tmp_path: Path, toys: Toys, trained: Trained) -> Callable[..., list[str]]:
    """The words of a short PPO run with a callable reward."""

    def words(**changes: str) -> list[str]:
        settings = {
            "run-dir": str(tmp_path / "run"), "policy": trained.sft, "prompts": toys.prompts, "iterations": "2",
            "reward": "stages.toy:share_of_e", "critic.init": "policy", "critic.pretrain-iterations": "0",
            "rollout-batch": "8", "minibatch": "4", "sampling.max-new-tokens": "6", "max-prompt-tokens": "96", **changes,
        }  # fmt: skip
        return ["ppo", *(word for name, value in settings.items() for word in (f"--{name}", *value.split())), *FLAGS]

    return words


def test_a_missing_file(refused: Said, sft: Any, reward: Any, ppo: Any) -> None:
    for words in (sft(data="nowhere.jsonl"), reward(data="nowhere.jsonl"), ppo(prompts="nowhere.jsonl")):
        assert refused(words).startswith("nowhere.jsonl: no such file. Expected a local file")


def test_no_data_at_all(refused: Said, sft: Any, ppo: Any) -> None:
    words = sft()
    at = words.index("--data")
    assert refused([*words[:at], *words[at + 2 :]]) == "--data: found nothing, expected dialogues to learn from"
    words = ppo()
    at = words.index("--prompts")
    assert refused([*words[:at], *words[at + 2 :]]) == "--prompts: found nothing, expected prompts to answer"


def test_malformed_json_at_its_line(refused: Said, sft: Any, ppo: Any, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in toy.dialogue_rows()[:3]]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, '{"prompt": "apple?", "response": ', "{}"]))
    for words in (sft(data=str(tmp_path / "rows.jsonl")), ppo(prompts=str(tmp_path / "rows.jsonl"))):
        assert refused(words).startswith(f"{tmp_path / 'rows.jsonl'}:4: malformed JSON, column")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-12])
    assert "cut.jsonl.gz: damaged gzip file" in refused(sft(data=str(tmp_path / "cut.jsonl.gz")))


def test_a_row_without_the_needed_field(refused: Said, reward: Any, ppo: Any, sft: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a?"}, {"question": "b?"}])
    assert refused(ppo(prompts=data)).startswith(
        f"{data}:2: a needed field is missing. Found keys: question. Expected one of: `prompt`"
    )
    assert refused(reward(data=data)).startswith(f"{data}:1: a needed field is missing. Found keys: prompt.")
    assert refused(sft(data=data)).startswith(f"{data}:1: a needed field is missing. Found keys: prompt.")


def test_empty_prompts_and_an_empty_file(
    refused: Said, ppo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "empty.jsonl", [{"prompt": " "}, {"prompt": ""}])
    assert refused(ppo(prompts=data)) == (
        f"{data}: no usable row is left: read 2 rows, kept 0; dropped 2 empty prompt (first {data}:1)"
    )
    nothing = write_rows(tmp_path / "nothing.jsonl", [])
    assert refused(ppo(prompts=nothing)) == f"{nothing}: no usable row is left: read 0 rows, kept 0"
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"prompt": "apple?"}, {"prompt": ""}])
    assert main(ppo(prompts=mixed)) == 0
    assert f"read 2 rows, kept 1; dropped 1 empty prompt (first {mixed}:2)" in capsys.readouterr().err


def test_prompts_longer_than_they_may_be(
    refused: Said, ppo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "long.jsonl", [{"prompt": "x" * 480}, {"prompt": "apple?"}])
    long_only = write_rows(tmp_path / "only.jsonl", [{"prompt": "x" * 480}])
    said = refused(ppo(prompts=data, **{"max-prompt-tokens": "600", "sampling.max-new-tokens": "20"}))
    assert (
        said == "policy: longest prompt + response: 519 tokens, but the model has positions for 512; lower the limits"
    )
    assert refused(ppo(prompts=long_only)) == "none of 1 prompts fits into 96 tokens; raise max_prompt_tokens"
    assert main(ppo(prompts=data)) == 0
    assert "1 longer than 96 tokens dropped" in capsys.readouterr().err


def test_pairs_of_equal_answers(refused: Said, reward: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "equal.jsonl", [{"prompt": "a?", "chosen": "same", "rejected": " same "}] * 3)
    assert refused(reward(data=data)) == (
        f"{data}: no usable row is left: read 3 rows, kept 0; dropped 3 chosen == rejected (first {data}:1)"
    )


def test_held_out_shares_that_leave_a_side_empty(refused: Said, reward: Any, sft: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", toy.pair_rows()[:1])
    said = refused(reward(data=data, heldout="0.01"))
    assert said.startswith("held-out fraction 0.01 of 1 prompts leaves one side empty")
    rows = write_rows(tmp_path / "rows.jsonl", toy.dialogue_rows()[:1])
    assert refused(sft(data=rows, heldout="0.01")).startswith("held-out fraction 0.01 of 1 prompts")


def without(folder: Path, *names: str) -> str:
    """A copy of the tiny model without some of its files."""
    shutil.copytree(embedded_directory("tiny") or "", folder)
    for name in names:
        (folder / name).unlink()
    return str(folder)


def test_a_model_directory_that_lacks_something(
    refused: Said, sft: Any, ppo: Any, trained: Trained, tmp_path: Path
) -> None:
    bare = without(tmp_path / "bare", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert refused(sft(model=bare)).startswith(f"{bare}: no tokenizer could be loaded")
    assert refused(sft(model="./nowhere")).startswith("./nowhere: no such directory. Expected a Hugging Face model")
    (tmp_path / "folder").mkdir()
    assert "found a directory without config.json" in refused(sft(model=str(tmp_path / "folder")))
    weightless = without(tmp_path / "weightless", "model.safetensors")
    assert f"{weightless}: cannot be loaded as" in refused(sft(model=weightless))
    said = refused(ppo(reward=trained.sft))
    assert said.startswith(
        f"{trained.sft}: found no trained score head (score.weight is missing), expected a reward model"
    )


def test_a_tokenizer_without_a_chat_template(refused: Said, sft: Any, tmp_path: Path) -> None:
    silent = without(tmp_path / "silent", "chat_template.jinja")
    said = refused(sft(model=silent))
    assert "it has no chat template. Give one with --compute.chat-template FILE, or a built-in one by name" in said
    assert main([*sft(model=silent), "--compute.chat-template", "chatml"]) == 0


def test_a_tokenizer_without_a_pad_token_simply_works(
    sft: Any, reward: Any, ppo: Any, tmp_path: Path, toys: Toys, trained: Trained
) -> None:
    padless = without(tmp_path / "padless")
    settings = json.loads((tmp_path / "padless" / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (tmp_path / "padless" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(padless).pad_token is None
    model = json.loads((tmp_path / "padless" / "config.json").read_text())
    (tmp_path / "padless" / "config.json").write_text(json.dumps({**model, "pad_token_id": None}))
    runs = {name: str(tmp_path / name) for name in ("sft", "reward", "ppo")}
    assert main(sft(model=padless, **{"run-dir": runs["sft"]})) == 0
    assert main(reward(model=f"{runs['sft']}/final", **{"run-dir": runs["reward"]})) == 0
    model_spec = f"{runs['reward']}/final"
    assert main(ppo(policy=f"{runs['sft']}/final", reward=model_spec, **{"run-dir": runs["ppo"]})) == 0
    assert len(metrics(Path(runs["ppo"]))) == 2
    # transformers finds the last token of a row by the pad id, so the exported reward model has one, and it is no eos.
    exported = AutoModelForSequenceClassification.from_pretrained(model_spec)
    assert exported.config.pad_token_id not in (None, AutoTokenizer.from_pretrained(model_spec).eos_token_id)


def test_a_critic_from_a_reward_model_of_another_vocabulary(
    refused: Said, ppo: Any, reward: Any, tmp_path: Path
) -> None:
    other = toy.other_vocabulary(tmp_path / "other")
    assert main(reward(model=other, **{"run-dir": str(tmp_path / "rm")})) == 0
    spec = str(tmp_path / "rm" / "final")
    assert refused(ppo(reward=spec, **{"critic.init": "reward"})) == (
        f"critic.init: the reward model {spec} has another vocabulary than the policy, so a critic cannot start from it; "
        "use --critic.init policy"
    )


def test_an_output_directory_that_belongs_to_something_else(
    sft: Any, ppo: Any, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = toy.file_hashes(trained.sft_run)
    assert main(ppo(**{"run-dir": str(trained.sft_run)})) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{trained.sft_run}: found a run of `ppomax sft`, expected one of `ppomax ppo`" in said
    assert main(sft(**{"run-dir": str(trained.sft_run)})) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "this directory holds a `ppomax sft` run with other settings" in said
    assert toy.file_hashes(trained.sft_run) == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    assert main([*sft(**{"run-dir": str(tmp_path / "home")}), "--fresh"]) == 2
    assert "found a directory with other files (thesis.txt)" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


SIZES = {
    "rollout-batch 8 minibatch 3": "minibatch: found 3, expected a divisor of rollout_batch 8, such as 2",
    "rollout-batch 8 samples-per-prompt 5": "samples_per_prompt: found 5, expected a divisor of rollout_batch 8, such as 4",
    "critic.pretrain-iterations 2": "critic.pretrain_iterations: found 2, expected less than iterations (2): the policy would "
    "never move",
    "sampling.top-p 0.9": "sampling.top_p: found 0.9, expected None: the KL to the reference and the ratio are undefined off "
    "the sampled support. Use it in `ppomax evaluate`",
    "ptx-weight 0.1": "ptx_weight: found a weight but no ptx_data; give --ptx-data FILE or --ptx-weight None",
    "ptx-data DIALOGUES": "ptx_data: found data but no weight; give --ptx-weight, e.g. 0.1, or leave the data out",
    "critic.init reward": "critic.init: found 'reward', but no reward is a model; expected 'policy' or a directory",
    "compute.train-layers 3": "train_layers: found 3, expected 1 to 2 (the model's layers)",
    "compute.device cuda:77": "device 'cuda:77' cannot be used:",
}


@pytest.mark.parametrize("flags", SIZES)
def test_settings_that_cannot_work_together(flags: str, refused: Said, ppo: Any, toys: Toys) -> None:
    names, values = flags.split()[0::2], flags.replace("DIALOGUES", toys.dialogues).split()[1::2]
    words = ppo(**{name: value for name, value in zip(names, values, strict=True) if not name.startswith("compute")})
    late = [w for n, v in zip(names, values, strict=True) if n.startswith("compute") for w in (f"--{n}", v)]
    assert refused([*words, *late]).startswith(SIZES[flags])


REWARDS = {
    "no_such_package:score": "no_such_package:score: cannot import module 'no_such_package'",
    "stages.toy:no_such": "stages.toy:no_such: found no callable 'no_such' in stages.toy",
    "stages.toy:nan_reward": "reward stages.toy:nan_reward: scores, entry 1: found nan, expected a finite number",
    "stages.toy:short_reward": "reward stages.toy:short_reward: found 7 values for 8 responses, expected one each",
    "stages.toy:broken_dense": "reward stages.toy:broken_dense: response ",
}


@pytest.mark.parametrize("spec", REWARDS)
def test_rewards_that_give_no_reward(spec: str, refused: Said, ppo: Any) -> None:
    assert refused(ppo(reward=spec)).startswith(REWARDS[spec])


def test_a_reward_that_raises_shows_its_own_error_and_the_mended_command_runs(
    ppo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError, match="the reward's own message"):
        main(ppo(reward="stages.toy:raising_reward"))
    assert not (tmp_path / "run").exists()
    assert main(ppo()) == 0


def test_a_reward_that_fails_later_leaves_what_was_saved(
    ppo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*ppo(reward="stages.toy:failing_reward", iterations="5"), "--save.every", "1"]
    monkeypatch.setattr(toy, "calls", itertools.count())
    monkeypatch.setattr(toy, "fails_at", 3)
    assert main(words) == 2
    assert "reward stages.toy:failing_reward: scores, entry 0: found inf" in " ".join(capsys.readouterr().err.split())
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1, 2]
    monkeypatch.setattr(toy, "fails_at", None)
    assert main([*words, "--resume"]) == 0
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_a_refused_command_leaves_an_empty_directory_as_it_was_and_a_mended_one_runs_there(
    ppo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    assert main(ppo(minibatch="3")) == 2
    assert list((tmp_path / "run").iterdir()) == []
    assert main(ppo()) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def filled(folder: Path, left: int) -> Path:
    """A file that leaves `left` bytes of the file system."""
    filler = folder / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(folder).free - left))
    return filler


def test_a_disk_too_small_for_the_checkpoints_is_found_before_step_1(
    sft: Any, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(small_disk, left=300_000)
    assert main(sft(**{"run-dir": str(small_disk / "run")})) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "free, expected" in said and "3 checkpoints of" in said
    assert "Free some space, keep fewer (save.keep), or choose another output directory" in said
    assert not (small_disk / "run").exists()


@pytest.mark.parametrize("room", [0, 60_000])
def test_a_disk_that_fills_up_during_the_run_stops_it_and_more_room_lets_it_go_on(
    room: int, ppo: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no room left not even a row can be written; with a little, rows can and the checkpoint cannot."""
    run_dir = small_disk / "run"
    words = [*ppo(reward="stages.toy:failing_reward", iterations="4", **{"run-dir": str(run_dir)}), "--save.every", "2"]
    monkeypatch.setattr(toy, "calls", itertools.count())
    monkeypatch.setattr(toy, "at_call", (2, lambda: filled(small_disk, room)))
    assert main(words) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot save (No space left on device" in said
    assert "free some space or choose another output directory, then go on with --resume" in said
    monkeypatch.setattr(toy, "at_call", None)
    (small_disk / "filler").unlink()
    assert main([*words, "--resume"]) == 0
    assert [row["iteration"] for row in metrics(run_dir)] == [0, 1, 2, 3]


def test_a_disk_that_cannot_be_written(sft: Any, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(sft(**{"run-dir": str(small_disk / "run")})) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"{small_disk / 'run'}: cannot write here (Read-only file system), expected a directory that can be written"
        in said
    )


def test_fresh_with_a_mistake_leaves_the_run_that_is_there(
    refused: Said, sft: Any, ppo: Any, tmp_path: Path, toys: Toys
) -> None:
    kept = str(tmp_path / "kept")
    assert main(sft(**{"run-dir": kept})) == 0
    before = file_hashes(tmp_path / "kept")
    assert "no such file" in refused([*sft(**{"run-dir": kept, "data": str(tmp_path / "typo.jsonl")}), "--fresh"])
    assert file_hashes(tmp_path / "kept") == before
    # Nor does it delete what it is to read.
    assert "no such directory" in refused([*ppo(**{"run-dir": kept, "policy": f"{kept}/final"}), "--fresh"])
    assert file_hashes(tmp_path / "kept") == before
    # No disk holds so many checkpoints.
    many = [*sft(**{"run-dir": kept}), "--fresh", "--save.keep", "10000000"]
    assert "Free some space, keep fewer (save.keep)" in refused(many)
    assert file_hashes(tmp_path / "kept") == before
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    refused(sft(**{"run-dir": str(link), "data": str(tmp_path / "typo.jsonl")}))
    assert link.is_symlink() and not list(link.iterdir())


def test_numbers_and_names_beyond_measure(refused: Said, sft: Any, tmp_path: Path) -> None:
    for flag, value, said in (
        ("optim.betas", "1.5 0.9", "less than 1"),
        ("seed", "99999999999999999999999", "less than"),
        ("epochs", "inf", "finite"),
    ):
        assert said in refused(sft(**{flag: value}))
    # Brackets are letters, not markup; what commands a terminal is not sent to it.
    assert main(sft(**{"run-dir": str(tmp_path / "[a]" / "[/b]")})) == 0
    data = tmp_path / "escape.jsonl"
    data.write_text('{"prompt": \x1b[2J')
    said = refused(sft(data=str(data)))
    assert "malformed JSON" in said and "\x1b" not in said


def test_the_toy_model_is_what_these_tests_take_it_for() -> None:
    """A byte is a token, and the tokenizer brings template and pad: what the tests take away is there."""
    folder = embedded_directory("tiny") or Path()
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("x" * 480).ids) == 480
    assert AutoTokenizer.from_pretrained(folder).pad_token is not None
    assert (folder / "chat_template.jinja").exists()
    assert len(prompt_rows(45)) == 45 == len({row["prompt"] for row in prompt_rows(45)})
