"""The example of a transformer that is fine-tuned through LoRA, on texts of a few lines."""

import json
import lzma

import jax
import pytest
from flax import nnx

from experiments.examples import lora
from experiments.models.gpt import GPT

PLAY = "To be, or not to be:\nthat is the question.\n" * 40
PAGES = " a rose is a rose . \n\n that is the <unk> question\n" * 20


@pytest.fixture
def folder(tmp_path):
    names = ("tinyshakespeare", "wikitext2_valid.tokens", "wikitext2_test.tokens")
    for name, content in zip(names, (PLAY, PAGES, PAGES), strict=True):
        (tmp_path / f"{name}.txt.xz").write_bytes(lzma.compress(content.encode()))
    return tmp_path


def test_the_second_text_has_the_letters_of_the_first(folder):
    play, pages = lora.letters(folder)
    spelled = "".join(pages.vocabulary[pages.train])
    assert spelled.startswith("a rose is a rose . \n \n that is the  question \n a rose")
    assert set(spelled) <= set(PLAY)
    assert pages.vocabulary is play.vocabulary


def test_adapters_add_nothing_at_first():
    model = GPT(5, context=4, width=8, depth=2, heads=2, rngs=nnx.Rngs(0))
    adapted = lora.with_adapters(model, 3, nnx.Rngs(1))
    x = jax.numpy.ones((2, 4), int)
    assert (adapted(x) == model(x)).all()
    assert len(jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam))) == 2 * 2 * 2
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))


@pytest.mark.long
def test_every_rule_has_a_row(folder, capsys):
    out = folder / "lora.json"
    lora.main(["--pretraining", "2", "--steps", "2", "--data", str(folder), "--out", str(out)])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "pretrained", "backpropagation", "fa", "sign", "dfa", "grape",
    ]  # fmt: skip
    found = json.loads(out.read_text())
    assert found["config"]["steps"] == 2
    assert all(0 < row["encyclopedia"] < 1e3 for row in found["arms"].values())
