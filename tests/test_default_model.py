"""The default weights: vocabulary, drawn clips and their reader, weight files, reconstruction."""

import json
import os

import pytest
import torch

from tessera.models.default import networks, vocabulary
from tessera.training.default import clips
from tessera.training.default.export import DIT_FILE, HERE, VAE_FILE

safetensors = pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: several threads on a busy machine only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def path(name):
    full = os.path.join(HERE, name)
    if not os.path.exists(full):
        pytest.skip("weights are not in this checkout")
    return full


def read_file(name):
    with safetensors.safe_open(path(name), "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def test_prompt_order_case_and_fillers():
    a = vocabulary.encode("red disc left")
    assert a.shape == (1, 3, 64) and a.dtype == torch.float32
    assert torch.equal(a, vocabulary.encode("A DISC, moving to the left; Red."))
    assert not torch.equal(a, vocabulary.encode("red disc right"))


def test_word_vectors_are_orthogonal():
    v = vocabulary.word_vectors()
    assert v.shape == (13, 64)
    assert torch.equal(v @ v.T, 64.0 * torch.eye(13))


def test_missing_words_are_zero():
    assert vocabulary.encode("").abs().sum() == 0
    a = vocabulary.encode("disc")[0]
    assert a[0].abs().sum() == 0 and a[2].abs().sum() == 0 and a[1].abs().min() == 1


def test_unknown_word_is_named_and_vocabulary_listed():
    with pytest.raises(ValueError) as e:
        vocabulary.encode("a red elephant")
    for word in ("elephant", *vocabulary.COLOURS, *vocabulary.SHAPES, *vocabulary.MOTIONS):
        assert word in str(e.value)
    with pytest.raises(ValueError):
        vocabulary.encode("red blue disc")


def test_reader_on_drawn_clips():
    g = torch.Generator().manual_seed(0)
    captions = clips.random_captions(72, g)
    assert len({tuple(c) for c in captions.tolist()}) == 72
    for frames, size in ((33, 128), (9, 64)):
        for c, x in zip(captions[:36], clips.draw(captions[:36], frames, size, g), strict=True):
            assert clips.score(x) == tuple(c.tolist())


def test_reader_sees_nothing_in_an_empty_clip():
    assert clips.score(torch.full((3, 9, 32, 32), -0.8)) == (None, None, None)


def test_drawn_clip_range_and_crop():
    g = torch.Generator().manual_seed(1)
    c = clips.random_captions(5, g)
    assert clips.draw(c, 5, 128, g, (32, 0.8)).shape == (5, 3, 5, 32, 32)
    x = clips.draw(c, 5, 128, g)
    assert x.shape == (5, 3, 5, 128, 128) and x.min() >= -1 and x.max() <= 1


def test_weight_files():
    for name, build, limit in ((DIT_FILE, networks.build_transformer, 8e6), (VAE_FILE, networks.build_vae, 2e6)):
        state, meta = read_file(name)
        assert os.path.getsize(path(name)) <= limit
        expected = build().state_dict()
        assert set(state) == set(expected)
        assert all(state[k].shape == expected[k].shape for k in state)
        assert all(v.isfinite().all() for v in state.values())
        assert meta["license"] == "Apache-2.0" and meta["training"] and meta["dataset"]
    config = json.loads(read_file(DIT_FILE)[1]["config"])
    assert config == {"transformer": {"text_dim": 64, "num_heads": 3}}


def test_fold_keeps_reconstruction():
    vae = networks.init_vae(networks.build_vae()).eval()
    x = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        z, y = vae.encode(x), vae.decode(vae.encode(x))
        mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
        networks.fold_statistics(vae, mean, std)
        white = networks.whiten(vae.encode(x))
        assert white.mean((0, 2, 3, 4)).abs().max() < 1e-3 and (white.std((0, 2, 3, 4)) - 1).abs().max() < 1e-3
        assert (vae.decode(vae.encode(x)) - y).abs().max() < 1e-3
        assert torch.allclose(networks.unwhiten(white), vae.encode(x), atol=1e-4)


def test_reconstruction_of_drawn_clips():
    vae = networks.build_vae().eval()
    vae.load_state_dict({k: v.float() for k, v in read_file(VAE_FILE)[0].items()})
    g = torch.Generator().manual_seed(77)
    captions = clips.random_captions(2, g)
    with torch.no_grad():
        for c in captions:
            x = clips.draw(c[None], 33, 128, g)
            y = vae.decode(vae.encode(x)).clamp(-1, 1)
            assert -10 * torch.log10((x - y).square().mean() / 4) >= 28
            assert clips.score(y[0]) == tuple(c.tolist())


def test_transformer_shapes_and_seeded_start():
    a, b = (networks.init_transformer(networks.build_transformer(layers=1), seed=3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    x = torch.randn(2, 16, 3, 4, 6)
    assert a(x, torch.tensor([500.0, 20.0]), vocabulary.embed([[0, 1, 2], [-1, -1, -1]])).shape == x.shape
