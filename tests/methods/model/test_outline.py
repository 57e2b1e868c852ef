"""The structure that a configuration tells is that of the loaded model, for every architecture, and nothing is read for it."""

from dataclasses import replace
from pathlib import Path

import pytest

from methods.model import load as loading
from methods.model.describe import describe
from methods.model.experts import UnsupportedModel
from methods.model.load import LoadError, load
from methods.model.outline import outline, outlined
from tests.tiny import ARCHITECTURES, save_tiny, tiny_config, tiny_model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_outline_is_the_structure(arch: str) -> None:
    found, expected = outlined(tiny_config(arch), "bf16"), describe(tiny_model(arch))
    assert found is not None
    feeds = [
        [(site.name, site.feed and site.feed.layer) for site in structure.sites] for structure in (found.structure, expected)
    ]
    assert feeds[0] == feeds[1]  # how rows lie in a fused linear only values show
    found, expected = (
        replace(structure, sites=tuple(replace(site, feed=None) for site in structure.sites))
        for structure in (found.structure, expected)
    )
    norms = [site.norm for site in expected.sites]
    if arch == "opt-post-norm":  # its norms look as if they folded; only values show that they do not
        assert [site.name for site in found.sites] == [site.name for site in expected.sites] and not all(norms)
    else:
        assert found == expected


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model")
    expected = load(str(folder), tmp_path / "cache").structure
    monkeypatch.setattr(loading, "_read", lambda *_: pytest.fail("weights were read"))
    found = outline(str(folder), tmp_path / "cache")
    assert found is not None and found.structure == expected
    assert all(parameter.is_meta for parameter in found.model.parameters())


def test_what_the_configuration_refuses_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "t5"'))
    with pytest.raises(LoadError, match="no causal language model"):
        outline(str(folder), tmp_path / "cache")


def test_layers_that_are_not_understood_are_refused_and_what_looks_at_values_is_not_known() -> None:
    from transformers import BloomConfig, MambaConfig

    with pytest.raises(UnsupportedModel, match="attention"):
        outlined(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), "bf16")
    found = outlined(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2), "bf16")
    assert found is None or len(found.structure.blocks) == 2
