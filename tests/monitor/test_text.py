from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppomax.monitor.text import (
    content_stems,
    degenerate_share,
    distinct_n,
    is_degenerate,
    looped_share,
    on_topic_share,
    text_health,
    tokens,
    top_closing_share,
    top_opening_share,
)


def test_tokens_are_words_of_latin_script_and_single_letters_of_others() -> None:
    assert tokens("Don\u2019t 'stop', 3 cafés!") == ["don't", "stop", "cafés"]
    assert tokens("我用 Python 写。") == ["我", "用", "python", "写"]


def test_scripts_with_spaces_have_words_and_others_have_letters() -> None:
    assert tokens("Сколько стоит билет? Việt Nam") == ["сколько", "стоит", "билет", "việt", "nam"]
    assert tokens("한국어 문장, हिन्दी में। می\u200cروم") == ["한국어", "문장", "हिन्दी", "में", "می\u200cروم"]
    assert tokens("ไทย 東京で") == ["ไ", "ท", "ย", "東", "京", "で"]


def test_long_prose_of_any_script_is_no_loop() -> None:
    sentences = ["Утром мы пошли на рынок за свежим хлебом.", "Дети играли у реки до самого вечера.",
                 "Бабушка рассказала старую сказку о медведе.", "Потом начался дождь, и все вернулись домой.",
                 "За ужином говорили о лете и о море."]  # fmt: skip
    assert not is_degenerate(" ".join(sentences))
    assert is_degenerate(" ".join(sentences[:1] * 4))


def test_letters_that_recur_in_a_script_without_spaces_are_no_loop() -> None:
    thai = ("ประเทศไทยตั้งอยู่ในเอเชียตะวันออกเฉียงใต้ มีกรุงเทพมหานครเป็นเมืองหลวงและเมืองที่ใหญ่ที่สุดของประเทศ "
            "ประชากรส่วนใหญ่นับถือศาสนาพุทธ และมีภาษาไทยเป็นภาษาราชการของประเทศ อาหารไทยเป็นที่นิยมในหลายประเทศทั่วโลก "
            "นักท่องเที่ยวจำนวนมากเดินทางมาเที่ยวทะเลและภูเขาในประเทศไทยทุกปี")  # fmt: skip
    assert looped_share(thai) < 0.4 and not is_degenerate(thai)
    assert looped_share("ฉันชอบกินข้าวผัด" * 5) == 1.0 and looped_share("我今天很高兴见到你" * 4) == 1.0


def test_a_topic_in_another_script_is_a_word_and_not_two_letters() -> None:
    prompts = ["Сколько стоит билет до Москвы?"] * 2
    assert on_topic_share(prompts, ["Билеты дешевле утром.", "Возьмите свёклу, капусту и мясо."]).share == 0.5


def test_distinct_n_counts_over_all_texts_but_not_across_them() -> None:
    # bigrams: a b, b a | a b: 3 of them, 2 distinct; "a | a" across the border is none.
    assert distinct_n(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct_n(["好好学", "好"], 2) == 1.0  # 好好, 好学
    assert distinct_n(["one", ""], 2) == 0.0


@given(st.lists(st.text(alphabet="ab c", max_size=12), max_size=6), st.integers(1, 3))
def test_distinct_n_does_not_depend_on_order_and_halves_when_all_is_said_twice(texts: list[str], n: int) -> None:
    assert distinct_n(texts[::-1], n) == distinct_n(texts, n)
    assert distinct_n(texts * 2, n) == pytest.approx(distinct_n(texts, n) / 2)


def test_content_stems_drop_stop_words_short_words_and_endings() -> None:
    assert content_stems("What do you think of my gardens? Don't go!") == {"think", "garden"}
    assert content_stems("my dog's gardening") == {"dog", "garden"}
    assert content_stems("我喜欢茶, ok") == {"我喜", "喜欢", "欢茶"}
    assert content_stems("How are you?") == frozenset()


def test_on_topic_share_leaves_prompts_without_content_words_out() -> None:
    prompts = ["Do you like dogs?", "How are you?", "Is the train late?", "你喜欢狗吗"]
    responses = ["A dog is good company.", "Well.", "It is great fun.", "我喜欢"]
    assert on_topic_share(prompts, responses) == (pytest.approx(2 / 3), 1)
    assert math.isnan(on_topic_share(["How are you?"], ["Fine"]).share)
    with pytest.raises(ValueError, match="shorter"):
        on_topic_share(["one", "two"], ["one"])


def test_top_shares_find_the_stock_phrase_and_count_all_texts() -> None:
    texts = ["I like tea. It is great fun!", "Trains are slow, it is great fun", "", "No."]
    assert top_closing_share(texts) == ("is great fun", 0.5)
    assert top_closing_share(texts, words=1) == ("fun", 0.5)
    assert top_opening_share(texts, words=2) == ("i like", 0.25)  # a tie: the alphabetically first
    assert top_opening_share(["我觉得好", "我觉得不好"]) == ("我觉得", 1.0)
    assert top_opening_share(["", "12"]) == ("", 0.0)
    assert math.isnan(top_opening_share([])[1])


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("", "No."),
        ("... !!", "12"),
        ("12 12 12 12", "3 + 4 = 7, 7 + 5 = 12"),
        ("step step step step", "Step 1, step 2, step 3, step 4."),
        ("The sides are cm, cm, cm, cm.", "The sides are 3 cm, 4 cm, 5 cm, 6 cm."),
        ("x x x x = 120", "2 x 3 x 4 x 5 = 120"),
        ("10 10 10 10", "The mask is 10.10.10.10, the price 1,000,000,000,000."),
        ("1 2 3, 1 2 3, 1 2 3", "1 2 3, 4 5 6, 7 8 9"),
        ("---", "🎉"),
        ("да да да да", "Мы живём в большом доме, и да, нам там хорошо."),
        ("Nice\x07 day", "Nice\n\tday, 👩\u200d🌾"),
        ("It was caf\ufffd", "It was café"),
        ("fun fun fun", "No, no!"),
        ("It is very very very very nice to see", "It is very, very, very nice to see"),
        ("fun we fun they fun she fun he fun", "fun we fun they had when she was there"),
        ("one and one and one one one", "one and two, and one and one"),  # 5 of 7 words, 3 of 7
        ("I like dogs and cats. I like dogs and cats.", "I like dogs and cats. I like birds and some fish too."),
        ("哈哈哈哈", "我喜欢喝茶, 也喜欢看书。"),
    ],
)
def test_is_degenerate_on_both_sides_of_each_rule(bad: str, good: str) -> None:
    assert is_degenerate(bad)
    assert not is_degenerate(good)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("a b", 0.0),
        ("one two three four five six", 0.0),
        ("one two three, one two three", 1.0),
        ("x one two three y one two three", 0.75),
        ("take 1 pill, take 2 pills, take 3 pills", 0.0),
        ("go to 12, go to 12", 1.0),
        ("no no no no", 1.0),  # the phrase overlaps itself
    ],
)
def test_looped_share_by_hand(text: str, share: float) -> None:
    assert looped_share(text) == share


def test_degenerate_share_and_health_of_a_batch() -> None:
    prompts = ["Do you like dogs?", "How was the train?"]
    responses = ["Dogs are good company.", "fun fun fun"]
    assert degenerate_share(responses) == 0.5
    assert text_health(prompts, responses) == {
        "on_topic_share": 0.5,
        "on_topic_left_out": 0.0,
        "top_opening_share": 0.5,
        "top_closing_share": 0.5,
        "distinct_1": pytest.approx(5 / 7),
        "distinct_2": pytest.approx(4 / 5),
        "degenerate_share": 0.5,
    }
