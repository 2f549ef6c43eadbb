"""offload-plan: what it reads from a file's header, what it predicts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.__main__ import main
from tessera.cli.offload_plan import lines
from tessera.models.offload.offline import CARDS, card, read_blocks, tokens_of
from tessera.models.offload.planner import GB

WEIGHTS = Path(__file__).parent.parent / "models" / "default" / "diffusion_models" / "tessera_shapes_t2v.safetensors"


def write_header(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A safetensors file of bf16 zeros, sparse on disk: only its header is ever read."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = 2
        for side in shape:
            nbytes *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


@pytest.fixture
def wan(tmp_path):
    """The matrices of Wan 2.1 14B."""
    dim, hidden = 5120, 13824
    shapes = {"patch_embedding.weight": [dim, 16, 1, 2, 2], "text_embedding.0.weight": [dim, 4096], "text_embedding.2.weight": [dim, dim]}
    for block in range(40):
        for attention in ("self_attn", "cross_attn"):
            shapes |= {f"blocks.{block}.{attention}.{name}.weight": [dim, dim] for name in "qkvo"}
        shapes |= {f"blocks.{block}.ffn.0.weight": [hidden, dim], f"blocks.{block}.ffn.2.weight": [dim, hidden]}
        shapes[f"blocks.{block}.modulation"] = [1, 6, dim]
    return write_header(tmp_path / "wan.safetensors", shapes)


def test_blocks_of_a_file(wan):
    blocks, fixed = read_blocks(wan)
    assert [block.name for block in blocks] == [f"blocks.{index}" for index in range(40)]
    assert {block.width for block in blocks} == {5120}
    assert blocks[0].nbytes == pytest.approx(0.70e9, rel=0.01)
    assert fixed == 2 * (5120 * 64 + 5120 * 4096 + 5120 * 5120)
    # 2 P N + 4 N^2 d of a block at 480p, 81 frames: 45 TFLOP.
    assert blocks[0].operations(32760) == pytest.approx(22.9e12 + 22.0e12, rel=0.01)


def test_two_lists_of_blocks(tmp_path):
    shapes = {f"double_blocks.{i}.img.weight": [64, 64] for i in range(3)} | {f"single_blocks.{i}.linear.weight": [64, 96] for i in range(4)}
    shapes |= {"txt_in.weight": [64, 64], "time.0.weight": [4, 4], "time.2.weight": [4, 4]}
    blocks, fixed = read_blocks(write_header(tmp_path / "flux.safetensors", shapes))
    assert [block.name for block in blocks] == [f"double_blocks.{i}" for i in range(3)] + [f"single_blocks.{i}" for i in range(4)]
    assert fixed == 2 * (64 * 64 + 32)


def test_the_built_in_weights_agree_with_the_loaded_module():
    from safetensors.torch import load_file

    from tessera.models.default import networks
    from tessera.models.offload import find_blocks

    module = networks.build_transformer().bfloat16()
    module.load_state_dict(load_file(WEIGHTS))
    blocks, _ = read_blocks(WEIGHTS)
    assert [(block.name, block.nbytes) for block in blocks] == [(block.name, block.nbytes) for block in find_blocks(module)]


@pytest.mark.parametrize(
    ("shape", "tokens"), [("81x480x832", 32760), ("1x1024x1024", 4096), ("1024x1024", 4096), ("1000", 1000), ("5 x 17 x 16", 2 * 2 * 1)]
)
def test_tokens(shape, tokens):
    assert tokens_of(shape) == tokens


@pytest.mark.parametrize("shape", ["", "0x4", "axb", "1x2x3x4", "-5"])
def test_shapes_that_make_no_sense(shape):
    with pytest.raises(ValueError, match="shape is"):
        tokens_of(shape)


def test_cards_are_found_by_any_spelling():
    assert card("rtx 3060") == card("RTX3060") == card("NVIDIA GeForce RTX 3060") == card("3060") == CARDS["RTX 3060"]
    with pytest.raises(ValueError, match=r"gpu is 'voodoo'.*--tflops"):
        card("voodoo")


def test_the_answer(wan):
    text = "\n".join(lines(wan, 8, "RTX 3060", "81x480x832", None, None))
    assert "40 blocks, 26.17 GB" in text and "32760 tokens" in text
    assert "resident: 10 blocks stay, 2 slots" in text and "100% hidden" in text
    assert "superpipeline: k = 12, k' = 1" in text
    assert "Prediction, not a measurement" in text and "4.0 of 12 GB are left" in text
    image = "\n".join(lines(wan, 8, "RTX 4090", "512x512", None, None))
    assert "t/c = 3.8" in image  # the link is the bottleneck, and is said to be
    own = "\n".join(lines(wan, 8, None, "1024x1024", 50.0, 12.0))
    assert "50 TFLOP/s" in own and "12 GB/s" in own


@pytest.mark.parametrize(
    ("gb", "gpu", "message"),
    [
        (1, "RTX 4090", "two blocks and what is outside the blocks need 1"),
        (float("nan"), "RTX 4090", "need 1"),
        (-3, "RTX 4090", "need 1"),
        (20, "RTX 3060", r"has 12; give less \(the smallest workable budget is 1"),
        (8, None, "gpu is missing"),
    ],
)
def test_bad_input(wan, gb, gpu, message):
    with pytest.raises(ValueError, match=message):
        list(lines(wan, gb, gpu, "81x480x832", None, None))


def test_command_line(wan, tmp_path, capsys):
    assert main(["offload-plan", "--model", str(wan), "--gb", "8", "--gpu", "RTX 3060"]) == 0
    assert "resident" in capsys.readouterr().out
    assert main(["offload-plan", "--model", str(tmp_path / "none"), "--gb", "8", "--gpu", "RTX 3060"]) == 1
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "text").write_text("not weights, but longer than eight bytes")
    assert main(["offload-plan", "--model", str(tmp_path / "text"), "--gb", "8", "--gpu", "RTX 3060"]) == 1
    assert "not a safetensors file" in capsys.readouterr().err
    flat = write_header(tmp_path / "flat.safetensors", {"weight": [8, 8]})
    assert main(["offload-plan", "--model", str(flat), "--gb", "8", "--gpu", "RTX 3060"]) == 1
    assert "no repeated blocks" in capsys.readouterr().err


def test_gigabytes_are_binary():
    assert GB == 1024**3
