"""CATANet in the stock loader: spandrel as PyPI has it, our registration, official key layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tessera.models.upscale import spandrel_catanet
from tessera.models.upscale.catanet import CATANet

try:
    import spandrel
except RuntimeError:
    # torch without CUDA beside PyPI's torchvision: torchvision's compiled operators do not load, and its import stops at those that it describes.
    # spandrel uses none of them.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    spandrel = pytest.importorskip("spandrel")
except ImportError:
    pytest.skip("needs spandrel: pip install spandrel", allow_module_level=True)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch):
    """spandrel's main registry as it was installed, put back afterwards."""
    registry = spandrel.MAIN_REGISTRY
    saved = dict(vars(registry))
    fresh = [support for support in registry if support.architecture.id != spandrel_catanet.ARCH_ID]
    clean = spandrel.ArchRegistry()
    clean.add(*fresh)
    vars(registry).update(vars(clean))
    yield registry
    vars(registry).update(saved)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_stock_loader(scale, registry, tmp_path):
    assert "is in the upscale model loader" in spandrel_catanet.register()
    net = CATANet(scale).eval()
    save_file(net.state_dict(), tmp_path / "some_name.safetensors")
    torch.save({"params": net.state_dict()}, tmp_path / "official.pth")
    x = torch.rand(1, 3, 19, 32)
    with torch.no_grad():
        expected = net(x).clamp(0, 1)
    for loaded in (
        spandrel.ModelLoader().load_from_file(tmp_path / "some_name.safetensors"),
        spandrel.ModelLoader().load_from_file(tmp_path / "official.pth"),
        spandrel.ModelLoader().load_from_state_dict({"params": net.state_dict()}),
    ):
        assert loaded.architecture.id == spandrel_catanet.ARCH_ID
        assert isinstance(loaded, spandrel.ImageModelDescriptor)
        assert (loaded.scale, loaded.input_channels, loaded.output_channels, loaded.purpose) == (scale, 3, 3, "SR")
        assert isinstance(loaded.model, CATANet)
        assert torch.equal(loaded(x), expected)


def test_our_files(registry, root):
    spandrel_catanet.register()
    for scale in (2, 4):
        loaded = spandrel.ModelLoader().load_from_file(root / f"models/upscale/upscale_models/tessera_catanet_x{scale}.safetensors")
        assert loaded.scale == scale
        assert next(loaded.model.parameters()).dtype == torch.float32
        assert loaded(torch.rand(1, 3, 20, 30)).shape == (1, 3, 20 * scale, 30 * scale)


def test_half_through_the_descriptor(registry):
    spandrel_catanet.register()
    loaded = spandrel.ModelLoader().load_from_state_dict(CATANet(2).state_dict())
    assert loaded.supports_half and loaded.supports_bfloat16
    for dtype in (torch.float16, torch.bfloat16):
        assert loaded.to(dtype)(torch.rand(1, 3, 30, 30).to(dtype)).isfinite().all()


def test_registering_twice_is_registering_once(registry):
    before = len(registry)
    spandrel_catanet.register()
    assert "already" in spandrel_catanet.register()
    assert len(registry) == before + 1


def test_steps_aside_for_spandrels_own(registry):
    class Own(spandrel.Architecture):
        def __init__(self):
            super().__init__(id="CATANet", detect=lambda state: False)

        def load(self, state):
            raise NotImplementedError

    registry.add(spandrel.ArchSupport.from_architecture(Own()))
    assert "own architecture" in spandrel_catanet.register()
    assert spandrel_catanet.ARCH_ID not in registry


def test_other_architectures_are_still_theirs(registry):
    """Nothing but CATANet is detected as CATANet, and no other architecture claims it."""
    spandrel_catanet.register()
    state = CATANet(4).state_dict()
    assert [support.architecture.id for support in registry if support.detect(state)] == [spandrel_catanet.ARCH_ID]
    assert not registry[spandrel_catanet.ARCH_ID].detect({"first_conv.weight": state["first_conv.weight"], "upconv1.weight": state["upconv1.weight"]})


def test_without_spandrel(run_python):
    run_python(
        "-c",
        """
import sys
sys.modules["spandrel"] = None
from tessera.models.upscale import spandrel_catanet
assert "spandrel cannot be imported" in spandrel_catanet.register()

class Broken:  # as when torchvision does not match torch
    def __getattr__(self, name):
        raise RuntimeError("operator torchvision::nms does not exist")

sys.modules["spandrel"] = Broken()
assert "nms does not exist" in spandrel_catanet.register()
""",
    )
