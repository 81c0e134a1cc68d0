from __future__ import annotations

from ppomax.monitor.samples import chosen_pairs, readable_prompt, training_samples


def _rows(gains: list[float]) -> list[dict[str, object]]:
    return [
        {"prompt": f"p{i}", "before": "b", "after": f"{gain:g}", "gold_before": 0.0, "gold_after": gain}
        for i, gain in enumerate(gains)
    ]


def test_pairs_are_spread_over_the_ranks_and_not_the_best_ones() -> None:
    spread, worst = chosen_pairs(_rows([float(i * 37 % 103) for i in range(103)]))
    assert [pair.after for pair in worst] == ["0", "1", "2"]
    # The other 100 ranks are 3..102; the middle of each twelfth of them.
    assert [pair.after for pair in spread] == [str(3 + int((i + 0.5) * 100 / 12)) for i in range(12)]


def test_the_reward_model_ranks_where_there_is_no_gold_score() -> None:
    rows = [{"prompt": "p", "before": "b", "after": str(i), "reward_before": 1.0, "reward_after": -i} for i in range(5)]
    spread, worst = chosen_pairs(rows)
    assert [pair.after for pair in worst] == ["4", "3", "2"]
    assert [pair.after for pair in spread] == ["1", "0"]
    assert spread[0].notes_after == "reward model -1.00"


def test_without_scores_there_is_no_worst() -> None:
    spread, worst = chosen_pairs([{"prompt": "p", "before": "b", "after": str(i)} for i in range(24)])
    assert worst == []
    assert [pair.after for pair in spread] == [str(2 * i + 1) for i in range(12)]
    assert chosen_pairs([]) == ([], [])


def test_training_samples_show_the_first_and_the_last_iteration() -> None:
    rows = [{"iteration": i, "prompt": "p", "response": f"{i}.{j}", "score": 0.5} for i in (1, 2, 9) for j in range(5)]
    shown = training_samples(rows)
    assert [sample.response for sample in shown] == ["1.0", "1.1", "1.2", "9.0", "9.1", "9.2"]
    assert shown[0].notes == "score 0.50"
    assert [s.response for s in training_samples(rows[:5])] == ["1.0", "1.1", "1.2"]


def test_prompts_are_readable_in_every_form() -> None:
    assert readable_prompt("Hi") == "Hi"
    assert readable_prompt([{"role": "user", "content": "Hi"}]) == "Hi"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert readable_prompt(turns) == "user: Hi\nassistant: Hello"
    assert len(readable_prompt("x" * 9999)) < 1600
