"""The patch adapter as a library network: what it starts as, its file, its mask, and that the shipped weights do their work."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tessera.models.default import networks
from tessera.models.upscale.patch_adapter import Config, PatchAdapter, Window, initialise, load, metadata
from tessera.training.default import clips, evaluate
from tessera.training.upscale.train_patch_adapter import HERE, WEIGHTS, LoraLinear, Model, degrade, resize

BOX = Window(0.25, 0.5, 0.75, 1.0)


def inputs(frames: int = 3) -> tuple:
    """Noisy latent, sigma, patch, augmentation, factor, windows, whole."""
    x, patch, whole = torch.randn(3, 1, 16, frames, 16, 16)
    return x, torch.tensor([0.7]), patch, torch.tensor([0.1]), torch.tensor([8.0]), [BOX], whole


def test_it_starts_as_nothing():
    """Zero where it joins the base: the first prediction of a training is the base's own."""
    _, base = evaluate.load()
    arguments = inputs()
    with torch.inference_mode():
        alone = base(arguments[0], 1000 * arguments[1], torch.zeros(1, 3, 64))
        model = Model(base, Config(), 4)
        torch.testing.assert_close(model(*arguments), alone, rtol=1e-5, atol=1e-5)
        model.adapter.to_base[2].bias.add_(torch.randn(192))
        assert (model(*arguments) - alone).abs().max() > 1e-2


def test_what_is_trained_is_what_is_saved(tmp_path):
    _, base = evaluate.load()
    model = Model(base, Config(), 4)
    state = model.trained()
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(value) for value in state.values() if isinstance(value, torch.nn.Parameter)} <= wanted
    assert sum(value.numel() for value in state.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    save_file({name: value.detach().contiguous() for name, value in state.items()}, str(tmp_path / "a.safetensors"), metadata=metadata(Config()))
    config, adapter, lora = load(tmp_path / "a.safetensors")
    assert config == Config()
    PatchAdapter(config).load_state_dict(adapter)
    assert set(lora) == {f"{name.replace('/', '.')}.{part}.weight" for name in model.lora for part in ("lora_up", "lora_down")}


def test_a_low_rank_update_is_a_product():
    base = torch.nn.Linear(12, 7)
    layer = LoraLinear(base, 3, torch.Generator().manual_seed(0))
    layer.lora_up.weight.data.normal_()
    merged = base.weight + layer.lora_up.weight @ layer.lora_down.weight
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, merged, base.bias))
    assert not base.weight.requires_grad or base.weight.grad is None


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (4, 4)])
def test_the_mask_covers_what_the_window_covers(height, width):
    for window in (BOX, Window(0, 0, 1, 1), Window(0.1, 0.2, 0.35, 0.95)):
        mask = window.mask(height, width)
        assert mask.shape == (1, 1, 1, height, width) and 0 <= mask.min() <= mask.max() <= 1
        assert float(mask.mean()) == pytest.approx((window.bottom - window.top) * (window.right - window.left), abs=1e-6)
    assert BOX.mask(16, 16)[0, 0, 0, 4:12, 8:].eq(1).all() and BOX.mask(16, 16).sum() == 64


def test_the_view_knows_the_window_and_does_not_know_the_noise():
    adapter = PatchAdapter(Config())
    whole = torch.randn(1, 16, 3, 16, 16)
    with torch.inference_mode():
        view = adapter.view(whole, [BOX])
        assert len(view) == 6 and all(part.shape == (1, 3 * 16, 192) for pair in view for part in pair)
        other = adapter.view(whole, [Window(0, 0, 0.5, 0.5)])
    assert not torch.equal(view[0][0], other[0][0])


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"other.safetensors is not a patch adapter"):
        load(tmp_path / "other.safetensors")


def test_initial_weights_are_the_same_everywhere():
    first, second = (initialise(PatchAdapter(Config())).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def shipped() -> Model:
    _, base = evaluate.load()
    tensors = load_file(HERE / WEIGHTS)
    rank = tensors["lora.blocks.0.self_attn.q.lora_down.weight"].shape[0]
    model = Model(base, load(HERE / WEIGHTS)[0], rank)
    with torch.no_grad():
        for name, parameter in model.trained().items():
            parameter.copy_(tensors[name].float())
    return model.eval()


def test_the_shipped_weights_are_small():
    assert (HERE / WEIGHTS).stat().st_size < 4_000_000


def test_the_shipped_weights_bring_back_what_was_lost(shipped):
    """Latent error of windows of two held-out clips after four steps: less than the enlarged clip's, and more without the view."""
    vae, _ = evaluate.load()
    generator = torch.Generator().manual_seed(990_321)
    errors: dict[str, list[float]] = {"enlarged": [], "adapter": [], "blank": []}
    with torch.inference_mode():
        for caption in clips.random_captions(2, generator):
            large = clips.draw(caption[None], 9, 256, generator)
            small = degrade(large, 8, 0.05, generator)
            x0, enlarged, whole = (networks.whiten(vae.encode(x)) for x in (large, resize(small, 256), resize(small, 128)))
            lost = (enlarged - x0).square().mean((0, 1, 2))
            sums = F.avg_pool2d(lost[None], 16, 8)[0]
            top, left = 8 * int(sums.argmax() // 3), 8 * int(sums.argmax() % 3)
            cut = (..., slice(top, top + 16), slice(left, left + 16))
            window = [Window(top / 32, left / 32, (top + 16) / 32, (left + 16) / 32)]
            errors["enlarged"].append(float((enlarged[cut] - x0[cut]).square().mean()))
            noise = torch.randn(x0[cut].shape, generator=generator)
            for name, view in (("adapter", whole), ("blank", torch.zeros_like(whole))):
                x = noise.clone()
                levels = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
                for now, after in itertools.pairwise(levels):
                    velocity = shipped(x, now[None], enlarged[cut], torch.zeros(1), torch.tensor([8.0]), window, view)
                    x = x + (after - now) * velocity
                errors[name].append(float((x - x0[cut]).square().mean()))
    assert sum(errors["adapter"]) < 0.8 * sum(errors["enlarged"]), errors
    assert sum(errors["adapter"]) < sum(errors["blank"]), errors
