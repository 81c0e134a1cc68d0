from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from monitor.conftest import HOSTILE, write_json, write_jsonl

from ppomax.errors import SaveError
from ppomax.monitor.plots import Line, Panel, line_chart
from ppomax.monitor.report import write_report
from ppomax.types import DataError, SetupError

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Page(HTMLParser):
    """Checks that tags are balanced and collects what a browser would load or run."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("h2", "h3"):
            self.headings.append(data.strip())


MakeRows = Callable[..., list[dict[str, Any]]]


def _report(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def _write_metrics(run: Path, rows: Iterable[dict[str, Any]]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def _write_summary(run: Path, summary: dict[str, Any]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_the_quickstart_report_has_every_chapter_and_picture_and_loads_nothing(quickstart_page: str) -> None:
    assert len(quickstart_page.encode()) < 2_000_000
    page = _Page(quickstart_page)
    expected = [
        "The verdict", "Time by stage", "What was done",
        "Supervised fine-tuning", "Loss",
        "The reward model", "Accuracy", "Margins", "Loss", "Calibration", "Accuracy by length", "Score along the answer",
        "Held-out pairs, most wrong", "Held-out pairs, surest of what is right", "Held-out pairs, closest calls",
        "Reinforcement learning with PPO", "Alarms", "Score of the reward model", "Distribution of the scores",
        "Gold score against KL", "Distance from the reference (KL)", "Response length", "Perplexity of the responses",
        "Entropy", "Health of the text", "Critic", "Size of the updates", "Losses and gradients", "Where the time goes",
        "Speed",
        "Answers sampled during training, first and last iteration",
        "Evaluation", "Win, tie, lose", "Before and after", "Answers side by side", "The 3 worst",
        "Glossary",
    ]  # fmt: skip
    assert page.headings == expected
    assert page.tags.count("svg") == 22
    assert all(link.startswith(("#", "data:image/png")) for link in page.links)
    assert not {"script", "iframe", "link", "img"} & set(page.tags)


def test_the_reward_models_verdict_and_its_pairs(quickstart_page: str) -> None:
    assert re.search(
        r"<strong>Fit for PPO\? Yes\.</strong> Accuracy 8\d%, \+3\d% over counting tokens", quickstart_page
    )
    assert quickstart_page.count("score 1.25") == 4 and quickstart_page.count("score -0.50") == 4


def test_text_of_models_is_escaped(quickstart_page: str) -> None:
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34; 你好" in quickstart_page
    assert "<script" not in quickstart_page


def test_the_headline_numbers_are_those_of_the_summary(quickstart_page: str) -> None:
    html = quickstart_page
    numbers = re.findall(
        r'<div class="value">(.*?)</div><div class="label">(.*?)</div><div class="note">(.*?)</div>', html
    )
    assert numbers == [
        ("85%", "win rate, gold judge", "95% interval 80% to 90%"),
        ("86%", "reward model accuracy", "of held-out pairs; guessing gives 50%"),
        ("6.1", "KL to the baseline", "nats per response"),
        ("18 \u2192 21", "response length", "tokens, before and after"),
        ("7 min 12 s", "wall time", "24 PPO iterations"),
    ]
    assert (
        "The policy is better than the baseline that it is compared with: on the given prompts, the gold judge" in html
    )
    assert "kept its variety and its topic" in html
    assert "<td>best of 4 of the baseline</td>" in html
    assert "iterations 22 to 24, 3 times" in html


def test_the_verdict_says_what_went_wrong(tmp_path: Path) -> None:
    gold = {"win": 0.4, "tie": 0.1, "lose": 0.5, "win_rate": 0.45, "ci95": [0.35, 0.55]}
    topic = {"topic_before": 0.8, "topic_after": 0.6, "wall_seconds": 7530}
    html = _report(_write_summary(tmp_path, {"gold": gold, **topic}))
    assert "No clear difference" in html
    assert "Fewer answers stay on their prompt&#39;s topic: 80% before, 60% after." in html
    assert "kept its variety" not in html
    assert "2 h 05 min" in html
    html = _report(_write_summary(tmp_path, {"gold": gold | {"ci95": [0.4, 0.49]}}))
    assert "The policy is worse than the baseline" in html
    few = {"opening_before": 0.25, "opening_after": 0.25}  # each of four answers opens in its own way
    assert "open with the same words" not in _report(_write_summary(tmp_path, {"gold": gold, **few}))
    cut = {"truncated_before": 0.1, "truncated_after": 0.4}  # 25 points more is where the alarm begins
    assert "The length limit cut 40% of the answers: raise sampling.max_new_tokens." in _report(
        _write_summary(tmp_path, {"gold": gold, **cut})
    )
    always = {"truncated_before": 0.8, "truncated_after": 0.8}
    assert "The length limit cut 80%" in _report(_write_summary(tmp_path, {"gold": gold, **always}))
    few = {"truncated_before": 0.2, "truncated_after": 0.4}
    html = _report(_write_summary(tmp_path, {"gold": gold, **few}))
    assert "The length limit cut" not in html
    assert "<td>answers cut by the length limit</td>" in html
    grown = {"opening_before": 0.02, "opening_after": 0.25}
    assert "25% of the answers open with the same words" in _report(_write_summary(tmp_path, {"gold": gold, **grown}))


def test_the_accuracy_is_never_that_of_a_training_batch(tmp_path: Path) -> None:
    rows = [{"step": i, "ranking_loss": 0.5, "loss": 0.5, "accuracy": 0.99} for i in range(3)]
    assert "reward model accuracy" not in _report(_write_metrics(tmp_path / "unwatched", rows))
    watched = _write_metrics(tmp_path / "watched", [*rows, {"step": 3, "heldout_accuracy": 0.64, "accuracy": 0.98}])
    assert '<div class="value">64%</div><div class="label">reward model accuracy</div>' in _report(watched)
    _write_summary(watched, {"accuracy": 0.71, "heldout_accuracy": 0.66})
    assert '<div class="value">71%</div><div class="label">reward model accuracy</div>' in _report(watched)


def test_the_reward_models_own_opinion_is_no_success(tmp_path: Path) -> None:
    better = {"win": 0.9, "tie": 0.0, "lose": 0.1, "win_rate": 0.9, "ci95": [0.85, 0.95]}
    html = _report(_write_summary(tmp_path, {"reward": better | {"by_source": {"a": better}}}))
    assert "The policy is better" not in html
    assert "Only the reward model compares policy and baseline" in html
    assert "For a policy that was trained on this score it is no evidence: name a --judge" in html
    assert re.search(r'<div class="number plain">\s*<div class="value">90%</div>', html)
    html = _report(_write_summary(tmp_path, {"reward": better, "gold": better}))
    assert "The policy is better" in html and "no evidence" not in html
    assert re.search(r'<div class="number good">\s*<div class="value">90%</div>', html)


def test_judges_and_sources_keep_their_names(tmp_path: Path) -> None:
    rates = [{"win": w, "tie": 0.0, "lose": 1 - w, "win_rate": w, "ci95": [w - 0.1, w + 0.1]} for w in (0.6, 0.7, 0.8)]
    first = rates[2] | {"by_source": {"my_source": rates[0]}}
    judges = {"my_judge": first, "gold": rates[0], "plain": rates[1]}  # the first one named is `gold`
    _write_summary(tmp_path / "evaluate", {"judges": judges, "gold": first, "reward": rates[1]})
    html = _report(_write_summary(tmp_path, {"gold": first, "reward": rates[1], "gold_guarded": rates[0]}))
    names = re.findall(r"<tr><td>([^<]*)</td><td class=\"figure\">\d+%</td>", html)
    assert names == ["judge my_judge", "judge my_judge, source my_source", "reward model", "judge gold", "judge plain"]
    assert '<div class="value">80%</div><div class="label">win rate, judge my_judge</div>' in html


def test_runs_side_by_side_took_the_sum_of_their_times(tmp_path: Path) -> None:
    for stage, seconds in (("sft", 100.0), ("reward", 200.5), ("ppo", 3000)):
        _write_metrics(tmp_path / stage, [{"step": 0, "loss": 1.0}])
        _write_summary(tmp_path / stage, {"wall_seconds": seconds})
    _write_summary(tmp_path / "evaluate", {"kl_per_sequence": 1.0})
    assert '<div class="value">55 min 00 s</div><div class="label">wall time</div>' in _report(tmp_path)  # 3300.5 s
    _write_summary(tmp_path, {"wall_seconds": 61.0})
    assert '<div class="value">1 min 01 s</div>' in _report(tmp_path)


@pytest.mark.parametrize(("length", "tone"), [(64.0, "bad"), (128.0, "plain")])
def test_a_kl_is_far_for_the_length_of_the_answers(tmp_path: Path, length: float, tone: str) -> None:
    html = _report(_write_summary(tmp_path, {"kl_per_sequence": 20.0, "length_before": length, "length_after": 64.0}))
    assert re.search(rf'<div class="number {tone}">\s*<div class="value">20.0</div>', html)


def test_the_evaluation_asserts_no_more_than_it_knows(quickstart_page: str) -> None:
    chapter = quickstart_page.partition('<section id="evaluate">')[2].partition('<section id="glossary">')[0]
    assert "Two models answered the same prompts" in chapter
    assert "neither was trained on" not in chapter and "before PPO" not in chapter and "after PPO" not in chapter


def test_a_run_may_be_named_by_a_string(quickstart: Path) -> None:
    assert write_report(str(quickstart)) == quickstart / "report.html"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = _write_summary(tmp_path, {"gold": {"win": 0.4, "tie": 0.1, "lose": 0.5, "win_rate": 0.45}})
    (run / "report.html.tmp").mkdir()
    with pytest.raises(SaveError, match=r"report\.html: found that it cannot be written"):
        write_report(run)


@pytest.mark.parametrize(
    "missing",
    [
        ("sft", "reward", "evaluate"),
        ("ppo", "summary.json", "sft/config.yaml"),
        ("ppo/metrics.jsonl", "evaluate/summary.json", "reward/metrics.jsonl"),
        ("sft/metrics.jsonl", "reward/summary.json", "ppo/samples.jsonl", "evaluate/samples.jsonl"),
    ],
)
def test_missing_pieces_are_left_out(quickstart: Path, missing: tuple[str, ...]) -> None:
    for name in missing:
        path = quickstart / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = _Page(_report(quickstart))
    assert "The verdict" in page.headings and "Glossary" in page.headings
    assert ("Entropy" in page.headings) == (quickstart / "ppo/metrics.jsonl").exists()
    assert ("Margins" in page.headings) == (quickstart / "reward/summary.json").exists()
    assert ("The 3 worst" in page.headings) == (quickstart / "evaluate/samples.jsonl").exists()


def test_a_run_of_one_stage_is_recognised_by_its_metrics(tmp_path: Path, make_ppo_rows: MakeRows) -> None:
    ppo = _write_metrics(tmp_path / "p", make_ppo_rows(iterations=3))
    reward = _write_metrics(tmp_path / "r", [{"step": 1, "ranking_loss": 0.69, "loss": 0.7}])
    sft = _write_metrics(tmp_path / "s", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}])
    assert "Score of the reward model" in _Page(_report(ppo)).headings
    assert '<div class="value">3</div><div class="label">PPO iterations</div>' in _report(ppo)
    assert "The reward model" in _Page(_report(reward)).headings
    assert "Supervised fine-tuning" in _Page(_report(sft)).headings


def test_rows_with_holes_null_and_odd_histograms_do_not_break_the_report(tmp_path: Path) -> None:
    rows = [
        {"iteration": 1, "score_mean": None, "nonfinite": ["score_mean"], "score_histogram": None},
        {"iteration": 2, "score_mean": 0.5, "score_std": None, "score_histogram": {"edges": [0, 1], "counts": []}},
        {"iteration": 3, "kl_per_sequence": 1.0, "score_histogram": {"edges": [2.0, 2.0], "counts": [4.0]}},
        {
            "iteration": 4,
            "score_mean": 0.7,
            "score_histogram": {"edges": [0, 1, None], "counts": [1, 1]},
            "alarms": None,
        },
    ]
    headings = _Page(_report(_write_metrics(tmp_path, rows))).headings
    assert "Score of the reward model" in headings and "Distribution of the scores" in headings
    assert not {"Entropy", "Where the time goes", "Speed"} & set(headings)


def test_a_long_run_stays_a_small_file(tmp_path: Path, make_ppo_rows: MakeRows) -> None:
    run = _write_metrics(tmp_path, make_ppo_rows(iterations=3000))
    assert write_report(run).stat().st_size < 2_000_000


def test_names_that_the_fonts_here_do_not_have_are_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = line_chart([1, 2], [Panel("奖励", [Line("评判", [0.1, 0.2]), Line("长度", [1, 2])])], xlabel="步")
    assert "奖励" in picture and "评判" in picture


def test_the_same_run_gives_the_same_file(quickstart: Path, quickstart_page: str) -> None:
    assert _report(quickstart) == quickstart_page


def test_nothing_to_report_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    with pytest.raises(SetupError, match=r"found no metrics\.jsonl, samples\.jsonl or summary\.json"):
        write_report(tmp_path)
    with pytest.raises(SetupError, match="no such directory"):
        write_report(tmp_path / "typo")
    assert not (tmp_path / "report.html").exists()


def test_a_corrupt_file_is_named(quickstart: Path) -> None:
    (quickstart / "summary.json").write_text('{"gold": ')
    with pytest.raises(DataError, match=r"summary\.json: malformed JSON"):
        _report(quickstart)


def test_the_data_card_is_a_table_and_a_picture(tmp_path: Path) -> None:
    histogram = {"edges": [0, 60, 120], "counts": [9, 3]}
    tokens = {"total": 12345, "median": 40.0, "p95": 90.0, "longest": 120, "histogram": histogram}
    card = {
        "read": 1200, "kept": 12, "dropped": {f"bad {HOSTILE}": {"rows": 2, "first": "a.jsonl:3"}}, "changed": {},
        "fitted": "3 cut", "share_a_heldout_prompt": 4, "prompts": 11, "repeated_rows": 1, "largest_prompt_group": 2,
        "sources": {"helpful": {"rows": 12, "prompts": 11, "weights": [0.5]}},
        "parts": {"learn": {"rows": 12, "prompts": 11, "tokens": tokens}},
    }  # fmt: skip
    write_json(tmp_path / "data.json", card)
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": i, "loss": 1.0} for i in range(3)])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert HOSTILE not in page
    for words in (
        "1,200, of which 12 kept", "2 (first a.jsonl:3)", "3 cut", "prompt is held out too", "12 rows, 11 prompts, weight 0.5",
        "12,345 tokens, median 40, 95% below 90, longest 120", "tokens of a sequence, prompt and answer",
    ):  # fmt: skip
        assert words in page, words
