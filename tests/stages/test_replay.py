"""Gradients that are no numbers end a run, and what ended it can be read again."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ppomax.cli import main
from ppomax.config import OptimConfig, ReplayConfig, SaveConfig
from ppomax.engine.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ppomax.errors import NonFiniteError, SetupError
from ppomax.stages.ppo import ppo
from ppomax.stages.replay import replay
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft
from stages.conftest import Toys, Trained
from stages.toy import FLOAT32, metrics, ppo_config, reward_config, sft_config, weights

# A rate that throws the weights so far that nothing finite comes back.
WILD = OptimConfig(lr=1e30, warmup=0.0, max_grad_norm=None)
BFLOAT16 = FLOAT32.model_copy(update={"dtype": "bfloat16"})


@pytest.fixture(scope="module")
def stopped(trained: Trained, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO run in bfloat16 with ptx that such a rate ended."""
    config = ppo_config(
        tmp_path_factory.mktemp("stopped") / "run", trained.sft, toys.prompts, minibatch=4, optim=WILD, iterations=9,
        ptx_data=(toys.dialogues,), ptx_weight=0.1, compute=BFLOAT16, save=SaveConfig(every=1),
    )  # fmt: skip
    with pytest.raises(NonFiniteError):
        ppo(config)
    return config.run_dir


def test_the_batch_is_kept_without_pickle_and_the_message_says_what_to_do(
    trained: Trained, toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"ppo --run-dir {tmp_path / 'run'} --policy {trained.sft} --prompts {toys.prompts} --iterations 9"
    words += " --reward stages.toy:share_of_e --critic.init policy --critic.pretrain-iterations 0 --rollout-batch 16"
    words += " --minibatch 4 --sampling.max-new-tokens 6 --compute.dtype float32 --optim.lr 1e30 --optim.warmup 0"
    assert main(words.split()) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "error: iteration 1: the gradient was not finite in 5 steps in a row; the player whose it was" in said
    assert f"The batch is in {tmp_path / 'run' / 'nonfinite' / 'iteration-1'}; to look into it: ppomax replay" in said
    kinds = {path.suffix for path in (tmp_path / "run" / "nonfinite").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}
    # Four steps an iteration: five in a row are more than one iteration has.
    assert [row["skipped_steps"] for row in metrics(tmp_path / "run")] == [3.0]


def test_replay_names_losses_norms_and_where_it_begins(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = replay(ReplayConfig(run_dir=stopped))
    assert [*found] == ["bfloat16", "float32"]
    for column in found.values():
        assert column["first: in the weights"] is None  # large, but numbers
        assert column["first: in the forward pass"] is None  # the norms tame them; their gradients cannot be
        assert column["first: in the gradient/policy"] is not None
        assert not math.isfinite(column["grad_norm/policy"]) and math.isfinite(column["policy_loss"])
        assert math.isfinite(column["grad_norm/critic"]) and math.isfinite(column["value_loss"])
        assert column["first: in the gradient/critic"] is None
        assert math.isfinite(column["ptx_loss"]) and not math.isfinite(column["grad_norm/ptx"])
    assert main(["replay", str(stopped)]) == 0
    out = capsys.readouterr().out
    assert out.split()[:2] == ["bfloat16", "float32"] and "first: in the forward pass" in out


def test_a_batch_with_one_bad_number_is_told_from_bad_weights(stopped: Path, trained: Trained, tmp_path: Path) -> None:
    path, _ = latest_checkpoint(stopped / "nonfinite")
    assert path is not None
    tensors, state = load_checkpoint(path)
    for name, weight in weights(Path(trained.sft)).items():
        if f"policy/{name}" in tensors:
            tensors[f"policy/{name}"] = weight.float()
    for name, x in tensors.items():
        if name.startswith("batch/"):
            tensors[name] = torch.zeros_like(x)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("config.yaml", "run.json"):
        (run_dir / name).write_bytes((stopped / name).read_bytes())
    save_checkpoint(run_dir / "nonfinite", "iteration-1", tensors, state)
    healthy = replay(ReplayConfig(run_dir=run_dir))["float32"]
    assert {value for key, value in healthy.items() if key.startswith("first: ")} == {None}
    assert all(math.isfinite(value) for key, value in healthy.items() if not key.startswith("first: "))
    tensors["batch/advantages_BR"][0, 0] = math.inf
    save_checkpoint(run_dir / "nonfinite", "iteration-2", tensors, state)
    spoilt = replay(ReplayConfig(run_dir=run_dir))["float32"]
    assert spoilt["first: in the batch"] == "advantages_BR"
    assert spoilt["first: in the weights"] is spoilt["first: in the forward pass"] is None
    assert not math.isfinite(spoilt["policy_loss"])


@pytest.mark.parametrize("verb", ["sft", "reward"])
def test_supervised_runs_stop_and_replay_too(verb: str, trained: Trained, toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 5: the gradient was not finite in 5 steps in a row"):
        if verb == "sft":
            sft(sft_config(tmp_path / "run", toys.dialogues, optim=WILD))
        else:
            reward(reward_config(tmp_path / "run", trained.sft, toys.pairs, optim=WILD))
    (found,) = replay(ReplayConfig(run_dir=tmp_path / "run")).values()
    assert found["first: in the weights"] is None
    assert not math.isfinite(found["grad_norm/model"])
    assert found["first: in the gradient/model"] is not None


def test_a_reward_model_with_a_weight_that_is_none_is_found_out(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    base = spoilt_copy(trained.sft, tmp_path / "base")
    with pytest.raises(NonFiniteError, match="step 4: the gradient was not finite in 5 steps in a row"):
        reward(reward_config(tmp_path / "run", base, toys.pairs, lm_weight=None))
    (found,) = replay(ReplayConfig(run_dir=tmp_path / "run")).values()
    assert found["first: in the weights"] == f"model/{SPOILT}"
    assert found["first: in the forward pass"] == "model/model.layers.1.mlp.up_proj (Linear)"
    assert math.isnan(found["loss"]) and math.isnan(found["grad_norm/model"])
    with pytest.raises(SetupError, match="base: found logits that are no numbers, expected finite ones"):
        sft(sft_config(tmp_path / "sft", toys.dialogues, model=base))
    with pytest.raises(SetupError, match="base: found logits that are no numbers, expected finite ones"):
        reward(reward_config(tmp_path / "with-lm", base, toys.pairs))


def test_a_reward_model_that_gives_no_numbers_is_named(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    """Before its scores reach the moments that all later ones are normalised by."""
    spoilt = spoilt_copy(trained.reward, tmp_path / "spoilt")
    with pytest.raises(SetupError, match=r"spoilt: found nan as the score of response 0 \(such scores: 16 of 16\)"):
        ppo(ppo_config(tmp_path / "run", trained.sft, toys.prompts, reward=(spoilt,)))


SPOILT = "model.layers.1.mlp.up_proj.weight"


def spoilt_copy(model: str, folder: Path) -> str:
    """The model with NaN in one weight."""
    shutil.copytree(model, folder)
    spoilt = weights(Path(model))
    spoilt[SPOILT][0, 0] = math.nan
    save_file(spoilt, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_failures_are_counted_across_a_resumption(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        return ppo_config(
            tmp_path / "run", trained.sft, toys.prompts, minibatch=4, optim=WILD, save=SaveConfig(every=1), **changes
        )

    def interrupting(prompts: Any, responses: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [text.count("e") / max(len(text), 1) for text in responses]

    calls: list[int] = []
    interrupting.__module__, interrupting.__qualname__ = "stages.toy", "share_of_e"
    with pytest.raises(KeyboardInterrupt):
        ppo(config(iterations=9), reward=interrupting)
    assert metrics(tmp_path / "run")[1]["skipped_steps"] == 3
    with pytest.raises(NonFiniteError, match="iteration 2"):
        ppo(config(iterations=9), resume=True)
    path, _ = latest_checkpoint(tmp_path / "run" / "nonfinite")
    assert path is not None
    assert len(load_checkpoint(path)[1]["prompt_ids"]) == 4
    assert len(metrics(tmp_path / "run")) == 2  # the second failing step of iteration 2 was the fifth


def test_a_run_without_such_a_batch_says_so(trained: Trained) -> None:
    with pytest.raises(SetupError, match="nonfinite: found nothing, expected the batch of a run that stopped"):
        replay(ReplayConfig(run_dir=trained.sft_run))
