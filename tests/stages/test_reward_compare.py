"""What a second reward model is compared by, and what is written down of a reward model's pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.architectures import save_model

from ppomax.config import RankConfig
from ppomax.errors import SaveError
from ppomax.models.load import export_scalar, load_scalar_lm, load_tokenizer
from ppomax.models.players import response_mask
from ppomax.stages.inputs import compute_of
from ppomax.stages.rank import rank
from ppomax.stages.reward import reward, reward_player
from ppomax.stages.reward_report import write_samples
from ppomax.types import SetupError, token_batch
from stages.conftest import Toys, Trained
from stages.toy import FLOAT32, reward_config

ROLE_TAGS = FLOAT32.model_copy(update={"chat_template": "role-tags"})


def without_template(model: str, folder: Path) -> str:
    """The reward model, as its dialogues are rendered by role tags, its own tokenizer saved without a template."""
    export_scalar(load_scalar_lm(model, compute_of(FLOAT32)), load_tokenizer(model, "role-tags"), folder)
    (folder / "chat_template.jinja").unlink()
    return str(folder)


def test_a_second_model_without_a_template_is_read_by_the_given_one(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    other = without_template(trained.reward, tmp_path / "other")
    again = without_template(trained.reward, tmp_path / "again")
    config = RankConfig(run_dir=tmp_path / "run", reward=other, data=(toys.pairs,), compare=again, compute=ROLE_TAGS)
    assert rank(config)["compared_with"]["agreement"] == 1.0
    short = reward_config(tmp_path / "r", trained.sft, toys.pairs, max_steps=1, compare=other, compute=ROLE_TAGS)
    assert reward(short)["compared_with"]["model"] == other


@pytest.mark.parametrize("verb", ["rank", "reward"])
def test_rows_that_do_not_fit_into_the_second_model_are_refused_at_once(
    verb: str, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    model, folder = load_scalar_lm(trained.reward, compute_of(FLOAT32)), tmp_path / "other"
    model.config.max_position_embeddings = 8  # type: ignore[union-attr]
    export_scalar(model, load_tokenizer(trained.reward), folder)
    with pytest.raises(SetupError, match=r"compare .*: longest prompt \+ response: \d+ tokens, but the model has .* 8"):
        if verb == "rank":
            files = {"reward": trained.reward, "data": (toys.pairs,), "compare": str(folder)}
            rank(RankConfig(run_dir=tmp_path / "run", compute=FLOAT32, **files))
        else:
            reward(reward_config(tmp_path / "run", trained.sft, toys.pairs, max_steps=1, compare=str(folder)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_lm_term_reads_an_unembedding_that_the_configuration_wrongly_calls_tied(tmp_path: Path) -> None:
    folder = save_model("llama-untied", tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | {"tie_word_embeddings": True}))
    player = reward_player(folder, compute_of(FLOAT32), reward_config(Path(), "", ""), trained=True)
    batch = token_batch([[3, 4]], [[5, 6]])
    logits = player.hidden(batch)[0, 1:3] @ load_head(tmp_path).T
    expected = torch.log_softmax(logits, -1)[[0, 1], [5, 6]]
    out = player(batch, lm_mask_BT=response_mask(batch)).logprobs_BT
    assert out is not None
    torch.testing.assert_close(out[0, 2:4], expected, atol=1e-5, rtol=0)


def test_samples_that_cannot_be_written_are_a_save_error(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    with pytest.raises(SaveError, match=r"samples\.jsonl: cannot save"):
        write_samples(tmp_path / "samples.jsonl", [])


def load_head(folder: Path) -> torch.Tensor:
    """The unembedding that the file holds."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["lm_head.weight"]
