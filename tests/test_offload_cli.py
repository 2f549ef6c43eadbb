"""offload-plan: what it reads from a file's header, what it predicts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.__main__ import main
from tessera.cli.offload_plan import lines
from tessera.models.errors import FileError
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


def test_of_a_whole_checkpoint_the_diffusion_model_counts(tmp_path):
    """Text encoders and VAE are repeated blocks too, and not on the GPU while the diffusion model runs."""
    own = {"in.weight": [64, 16]} | {f"blocks.{i}.w": [64, 64] for i in range(4)}
    alone = read_blocks(write_header(tmp_path / "model.safetensors", own))
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in own.items()}
    shapes |= {f"text_encoders.t5xxl.transformer.encoder.block.{i}.layer.0.w": [128, 128] for i in range(6)}
    shapes |= {f"first_stage_model.decoder.up.{i}.w": [64, 64] for i in range(4)} | {"vae.w": [256, 256]}
    blocks, fixed = read_blocks(write_header(tmp_path / "all.safetensors", shapes))
    assert ([block.nbytes for block in blocks], fixed) == ([block.nbytes for block in alone[0]], alone[1])


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
    ("shape", "tokens"),
    [("81x480x832", 32760), ("1x1024x1024", 4096), ("1024x1024", 4096), ("1000", 1000), ("5 x 17 x 16", 2 * 2 * 1), ("16X１６", 1)],
)
def test_tokens(shape, tokens):
    assert tokens_of(shape) == tokens


@pytest.mark.parametrize("shape", ["", "0x4", "axb", "1x2x3x4", "-5", "²x2", "1e3", "1_0", "x", "4x", "0.5", "9" * 23, "9" * 5000])
def test_shapes_that_make_no_sense(shape):
    with pytest.raises(ValueError, match=r"shape is '.*'; give frames x height x width"):
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
        (20, "RTX 3060", r"has 12; give less \(the smallest workable budget is 1"),
        (8, None, "gpu is missing"),
    ],
)
def test_bad_input(wan, gb, gpu, message):
    with pytest.raises(ValueError, match=message):
        list(lines(wan, gb, gpu, "81x480x832", None, None))


@pytest.mark.parametrize("option", ["--gb", "--tflops", "--gbps", "--passes"])
@pytest.mark.parametrize("value", ["-3", "0", "nan", "inf", "-inf", "1e300", "1e-300", "1" + "0" * 400])
def test_numbers_that_make_no_sense(wan, capsys, option, value):
    """Also where another number would decide, and where argparse has a say: only whole numbers are passes."""
    arguments = {"--gb": "8", "--gpu": "RTX 3060", "--tflops": "50", "--gbps": "12", "--passes": "2"} | {option: value}
    try:
        assert main(["offload-plan", "--model", str(wan), *(f"{name}={text}" for name, text in arguments.items())]) == 1
        out, text = capsys.readouterr()
        assert f"{option[2:]} is {int(value) if option == '--passes' else f'{float(value):g}'}; give a " in text
    except SystemExit as end:
        out, text = capsys.readouterr()
        assert end.code == 2 and f"invalid int value: '{value}'" in text and option == "--passes"
    assert not out


def test_the_smallest_and_largest_numbers_work(wan):
    for number in (1e-3, 1e6):
        text = "\n".join(lines(wan, 1e6, None, "999999999x999999999x999999999", number, number, 1_000_000))
        assert "40 blocks stay" in text and "nan" not in text
    with pytest.raises(ValueError, match="need 1"):
        list(lines(wan, 1e-3, None, "1", 1e6, 1e6))


def cut(path: Path, names: list[str], whole: Path, of: dict[str, str]) -> list[Path]:
    """The file `whole` in parts of these names, tensor by tensor as `of` says."""
    length = int.from_bytes(whole.read_bytes()[:8], "little")
    shapes = {name: entry["shape"] for name, entry in json.loads(whole.read_bytes()[8 : 8 + length]).items()}
    return [write_header(path / part, {name: shape for name, shape in shapes.items() if of[name] == part}) for part in names]


def test_a_model_in_parts(tmp_path, capsys):
    """Any of its parts, or its index, is the whole model; a block may be cut in two."""
    shapes = {f"blocks.{block}.{name}.weight": [64, 64] for block in range(4) for name in ("q", "k")} | {"head.weight": [64, 64]}
    whole = write_header(tmp_path / "whole.safetensors", shapes)
    names = [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    of = {name: names[min(index // 3, 2)] for index, name in enumerate(shapes)}
    parts = cut(tmp_path, names, whole, of)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": of}))
    expected = read_blocks(whole)
    assert len(expected[0]) == 4
    for file in (*parts, index):
        assert read_blocks(file) == expected
        assert f"{file.name} (3 files): 4 blocks" in next(lines(file, 1, "RTX 3060", "1000", None, None))
    parts[1].unlink()
    for file in (parts[0], parts[2], index):
        assert main(["offload-plan", "--model", str(file), "--gb", "1", "--gpu", "RTX 3060"]) == 1
        out, text = capsys.readouterr()
        assert not out and str(file) in text and names[1] in text and "put all parts into one folder" in text


@pytest.mark.parametrize("name", ["m-00003-of-00002.safetensors", "m-00000-of-00002.safetensors", "m-1-of-999999999.safetensors"])
def test_names_of_parts_that_cannot_be(tmp_path, name):
    with pytest.raises(FileError, match=r"is called part \d+ of \d+"):
        read_blocks(write_header(tmp_path / name, {"blocks.0.w": [4, 4], "blocks.1.w": [4, 4]}))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(FileError, match=r"m\.safetensors\.index\.json"):
        read_blocks(tmp_path / "m.safetensors.index.json")


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
