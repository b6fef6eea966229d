"""Model cards say what is known, and nothing where nothing is known."""

import pytest
from huggingface_hub import ModelCard, get_session
from tiny import ROOT

from ddgan.hub.cards import CardFacts, card_text, is_repo_id, license_of, nobody_wrote


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *[(name, True) for name in ("user/model", "google/ddpm-cifar10-32")],
        *[(name, False) for name in ("model", None, "a/b/c", "examples/data", "user/mod el", "/tmp/model")],
    ],
)
def test_only_names_that_the_hub_takes_become_links(name, is_one, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert is_repo_id(name) == is_one


def test_a_licence_is_carried_over_from_a_folders_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# model\n")
    assert license_of(str(tmp_path)) == {"license": "cc-by-4.0"}
    (tmp_path / "README.md").write_text("# model without metadata\n")
    assert license_of(str(tmp_path)) == {}
    assert license_of("nobody/nothing") == {}


@pytest.mark.parametrize(
    ("card", "written"),
    [
        ("---\nlicense: mit\n---\n", False),
        ("---\nlicense: mit\n---", False),
        ("---\r\nlicense: mit\r\n---\r\n\r\n", False),
        ("---\nlicense: mit\n---\n# model\n", True),
        ("---\nlicense: mit\n---\nmine\n---\n", True),
        ("# model\n", True),
    ],
)
def test_metadata_alone_was_written_by_nobody(card, written):
    assert nobody_wrote(card) != written


@pytest.mark.parametrize("link", ["LICENSE.md", "https://x.y/license"])
def test_a_licence_of_its_own_keeps_its_name_and_its_text(local_hub, link):
    card = f"---\nlicense: other\nlicense_name: ours\nlicense_link: {link}\n---\n# base\n"
    local_hub.add("bob/base", **{"README.md": card.encode(), "LICENSE.md": b"Ask Bob."})
    facts = CardFacts("title", "summary", "print(1)", {}, base_model="bob/base", **license_of("bob/base"))
    made = ModelCard(card_text(facts))
    made.validate()
    assert (made.data.license, made.data.license_name) == ("other", "ours")
    assert f"[`ours`]({made.data.license_link}), carried over" in made.text
    if "://" in link:
        assert made.data.license_link == link
    else:
        assert get_session().get(made.data.license_link).text == "Ask Bob."


def test_what_is_known_is_in_the_metadata_and_what_is_not_is_left_out():
    facts = CardFacts(
        "title", "summary", "print(1)", {"seed": 0}, base_model="user/base", license="mit", dataset="u/d"
    )
    card = ModelCard(card_text(facts))
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", "user/base", ["u/d"])
    assert card.data.base_model_relation == "finetune"
    card = ModelCard(
        card_text(CardFacts("title", "summary", "print(1)", {}, base_model="/tmp/base", dataset="folder"))
    )
    assert (card.data.license, card.data.base_model, card.data.datasets) == (None, None, None)
    assert "base_model_relation" not in card.data.to_dict()
    assert "licence of the model that was started from is not known" in card.content
