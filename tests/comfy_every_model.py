"""Runs inside ComfyUI's Python (see test_comfy_every_model.py): every diffusion network of ComfyUI, small, with random weights.

    python comfy_every_model.py COMFYUI PACKAGE_PARENT [NAME ...]

Prints one JSON object per network: whether it ran as it does alone, what our override made of its calls, and any error by name. Left out
are those that resist being made small in a few lines: Mochi, LTX-AV, Cosmos 1, PixArt, ACE-Step, Stable Audio, SeedVR2, Trellis2,
Triposplat, HiDream-O1, MiniMax.
"""

import importlib
import json
import sys
import traceback

COMFYUI, PACKAGE_PARENT, *NAMES = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.ops  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does: nodes.py puts a folder with another `utils` before it)

from tessera.kernels import attention as kernel  # noqa: E402
from tessera.kernels import dispatch, selftest  # noqa: E402
from tessera.models.families import spans_of  # noqa: E402
from tessera.models.patchers.attention import ModelCall  # noqa: E402
from tessera.models.patchers.settings import AttentionSettings  # noqa: E402
from tessera.nodes.attention.host import KEY, OVERRIDE, _AttentionHost  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)
WAN = dict(dim=128, ffn_dim=64, text_dim=32, num_heads=2, num_layers=2, freq_dim=32, text_len=16)
JOINT = dict(vec_in_dim=32, context_in_dim=32, hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], mlp_ratio=2.0)


def rn(*shape):
    return torch.randn(shape, generator=GENERATOR)


def image(channels=16, side=16):
    return dict(x=rn(2, channels, side, side), context=rn(2, 8, 32))


def video(channels=16, frames=3):
    return dict(x=rn(2, channels, frames, 16, 16), context=rn(2, 16, 32))


# name: (module.Class, arguments of the class, arguments of a call)
NETWORKS = {
    "sd 3.5 medium": (
        "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        dict(
            input_size=None,
            patch_size=2,
            in_channels=16,
            depth=2,
            adm_in_channels=32,
            context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
            num_patches=36864,
            pos_embed_max_size=192,
            pos_embed_scaling_factor=None,
            qk_norm="rms",
            x_block_self_attn_layers=[0],
        ),
        lambda: {**image(), "y": rn(2, 32)},
    ),
    "flux": (
        "flux.model.Flux",
        dict(JOINT, in_channels=16, out_channels=16, theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[]),
        lambda: {**image(), "y": rn(2, 32), "guidance": rn(2)},
    ),
    "aura flow": (
        "aura.mmdit.MMDiT",
        dict(in_channels=4, out_channels=4, dim=128, n_layers=2, n_double_layers=1, n_heads=2, global_conddim=128, cond_seq_dim=32, max_seq=256),
        lambda: image(4),
    ),
    "wan": ("wan.model.WanModel", WAN, video),
    "wan i2v": ("wan.model.WanModel", dict(WAN, model_type="i2v", in_dim=36), lambda: {**video(36), "clip_fea": rn(2, 257, 1280)}),
    "wan vace": (
        "wan.model.VaceWanModel",
        dict(WAN, vace_layers=1, vace_in_dim=96),
        lambda: {**video(), "vace_context": rn(2, 1, 96, 3, 16, 16), "vace_strength": [1.0]},
    ),
    "wan camera": ("wan.model.CameraWanModel", dict(WAN, in_dim=32), lambda: {**video(32), "camera_conditions": rn(2, 24, 3, 128, 128)}),
    "wan humo": (
        "wan.model.HumoWanModel",
        dict(WAN, in_dim=36),
        lambda: {**video(36), "audio_embed": rn(2, 3, 8, 5, 1280), "reference_latent": rn(2, 36, 1, 16, 16)},
    ),
    "wan s2v": (
        "wan.model.WanModel_S2V",
        dict(WAN, audio_inject_layers=[0], audio_dim=32, num_audio_token=4),
        lambda: {
            **video(),
            "audio_embed": rn(2, 25, 32, 12),
            "reference_latent": rn(2, 16, 1, 16, 16),
            "control_video": rn(2, 16, 3, 16, 16),
            "reference_motion": rn(2, 16, 19, 16, 16),
        },
    ),
    "wan animate": (
        "wan.model_animate.AnimateWanModel",
        dict(WAN, in_dim=36, num_layers=5),
        lambda: {**video(36), "pose_latents": rn(2, 16, 2, 16, 16)},
    ),
    "wan causal": ("wan.ar_model.CausalWanModel", WAN, video),
    "wan scail": (
        "wan.model.SCAILWanModel",
        dict(WAN),
        lambda: {**video(20), "pose_latents": rn(2, 20, 3, 8, 8), "reference_latent": rn(2, 20, 1, 16, 16)},
    ),
    "wan scail 2": (
        "wan.model.SCAIL2WanModel",
        dict(WAN),
        lambda: {**video(20), "pose_latents": rn(2, 20, 3, 8, 8), "reference_latent": rn(2, 20, 1, 16, 16)},
    ),
    "wan dancer": (
        "wan.model_wandancer.WanDancerModel",
        dict(WAN, audio_inject_layers=[0], music_dim=32, music_heads=2, music_feature_dim=35, music_latent_dim=32),
        lambda: {**video(), "audio_embed": rn(2, 90, 35)},
    ),
    "wan animate 2": ("wan.model_animate2.WanAnimate2Model", dict(WAN, in_dim=36), lambda: video(36)),
    "hunyuan video": (
        "hunyuan_video.model.HunyuanVideo",
        dict(
            JOINT,
            in_channels=16,
            out_channels=16,
            theta=256,
            patch_size=[1, 2, 2],
            qkv_bias=True,
            guidance_embed=True,
            byt5=False,
            meanflow=False,
            vision_in_dim=None,
            use_cond_type_embedding=False,
            meanflow_sum=False,
        ),
        lambda: {**video(), "y": rn(2, 32), "guidance": rn(2)},
    ),
    "chroma": (
        "chroma.model.Chroma",
        dict(
            JOINT,
            in_channels=64,
            out_channels=64,
            in_dim=64,
            out_dim=128,
            hidden_dim=64,
            n_layers=1,
            theta=10000,
            patch_size=2,
            qkv_bias=True,
            txt_ids_dims=[],
        ),
        lambda: {**image(), "guidance": rn(2)},
    ),
    "chroma radiance": (
        "chroma_radiance.model.ChromaRadiance",
        dict(
            JOINT,
            in_channels=3,
            out_channels=3,
            in_dim=64,
            out_dim=128,
            hidden_dim=64,
            n_layers=1,
            theta=10000,
            patch_size=16,
            qkv_bias=True,
            txt_ids_dims=[],
            use_sequential_txt_ids=False,
            nerf_hidden_size=16,
            nerf_mlp_ratio=2,
            nerf_depth=1,
            nerf_max_freqs=4,
            nerf_tile_size=0,
            nerf_final_head_type="conv",
            nerf_embedder_dtype=torch.float32,
            use_x0=False,
        ),
        lambda: {**image(3, 128), "guidance": rn(2)},
    ),
    "qwen image": (
        "qwen_image.model.QwenImageTransformer2DModel",
        dict(num_layers=2, num_attention_heads=1, joint_attention_dim=32),
        lambda: video(frames=1),
    ),
    "ltxv": (
        "lightricks.model.LTXVModel",
        dict(in_channels=16, cross_attention_dim=128, attention_head_dim=64, num_attention_heads=2, caption_channels=32, num_layers=2),
        lambda: {**video(), "attention_mask": torch.ones(2, 16, dtype=torch.long)},
    ),
    "lumina 2": (
        "lumina.model.NextDiT",
        dict(
            in_channels=16,
            dim=128,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=1,
            qk_norm=True,
            cap_feat_dim=32,
            axes_dims=(16, 24, 24),
            axes_lens=(64, 64, 64),
        ),
        lambda: {**image(), "num_tokens": 8},
    ),
    "z-image": (
        "lumina.model.NextDiT",
        dict(
            in_channels=16,
            dim=256,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            qk_norm=True,
            cap_feat_dim=32,
            axes_dims=(16, 24, 24),
            axes_lens=(64, 64, 64),
            z_image_modulation=True,
            pad_tokens_multiple=32,
        ),
        lambda: {**image(), "num_tokens": 8},
    ),
    "omnigen 2": (
        "omnigen.omnigen2.OmniGen2Transformer2DModel",
        dict(
            hidden_size=192,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            axes_dim_rope=(16, 16, 16),
            axes_lens=(64, 64, 64),
            text_feat_dim=32,
        ),
        lambda: {**image(), "num_tokens": 8, "ref_latents": [rn(2, 16, 8, 8)]},
    ),
    "boogu": (
        "boogu.model.BooguTransformer2DModel",
        dict(
            hidden_size=192,
            num_layers=1,
            num_double_stream_layers=1,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            axes_dim_rope=(16, 16, 16),
            axes_lens=(64, 64, 64),
            instruction_feat_dim=32,
        ),
        lambda: {**image(), "num_tokens": 8},
    ),
    "hidream": (
        "hidream.model.HiDreamImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            caption_channels=[32, 32],
            text_emb_dim=32,
            axes_dims_rope=(32, 16, 16),
            llama_layers=[0, 0],
        ),
        lambda: dict(x=rn(2, 16, 16, 16), y=rn(2, 32), context=rn(2, 8, 32), encoder_hidden_states_llama3=rn(2, 2, 8, 32)),
    ),
    "cosmos predict 2": (
        "cosmos.predict2.MiniTrainDIT",
        dict(
            max_img_h=32,
            max_img_w=32,
            max_frames=16,
            in_channels=16,
            out_channels=16,
            patch_spatial=2,
            patch_temporal=1,
            model_channels=128,
            num_blocks=2,
            num_heads=2,
            crossattn_emb_channels=32,
            pos_emb_cls="rope3d",
            use_adaln_lora=True,
            adaln_lora_dim=16,
        ),
        video,
    ),
    "anima": (
        "anima.model.Anima",
        dict(
            max_img_h=32,
            max_img_w=32,
            max_frames=16,
            in_channels=16,
            out_channels=16,
            patch_spatial=2,
            patch_temporal=1,
            model_channels=128,
            num_blocks=2,
            num_heads=2,
            crossattn_emb_channels=1024,
            pos_emb_cls="rope3d",
            use_adaln_lora=True,
            adaln_lora_dim=16,
        ),
        lambda: {**video(frames=1), "context": rn(2, 16, 1024)},
    ),
    "kandinsky 5": (
        "kandinsky5.model.Kandinsky5",
        dict(in_text_dim=32, in_text_dim2=32, time_dim=32, model_dim=128, ff_dim=64, num_text_blocks=1, num_visual_blocks=2, visual_embed_dim=64),
        lambda: {**video(), "y": rn(2, 32)},
    ),
    "mage flow": (
        "mage_flow.model.MageFlowTransformer2DModel",
        dict(in_channels=16, out_channels=16, num_layers=2, num_attention_heads=1, joint_attention_dim=32),
        image,
    ),
    "krea 2": (
        "krea2.model.SingleStreamDiT",
        dict(features=256, tdim=32, txtdim=32, heads=2, kvheads=1, multiplier=2, layers=2, txtlayers=2, txtheads=1, txtkvheads=1),
        lambda: {**image(), "context": rn(2, 8, 64)},
    ),
    "lens": (
        "lens.model.LensTransformer2DModel",
        dict(in_channels=16, out_channels=4, num_layers=2, num_attention_heads=2, enc_hidden_dim=32),
        lambda: {**image(), "context": rn(2, 8, 128)},
    ),
    "joy image": (
        "joyimage.model.JoyImageTransformer3DModel",
        dict(hidden_size=128, num_attention_heads=1, text_dim=32, num_layers=2),
        lambda: dict(hidden_states=rn(2, 16, 1, 16, 16), context=rn(2, 8, 32)),
    ),
    "ideogram 4": (
        "ideogram4.model.Ideogram4Transformer2DModel",
        dict(
            in_channels=16,
            num_layers=2,
            num_attention_heads=1,
            attention_head_dim=128,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=32,
            mrope_section=(24, 20, 20),
        ),
        image,
    ),
    "cogvideo x": (
        "cogvideo.model.CogVideoXTransformer3DModel",
        dict(
            num_attention_heads=2, time_embed_dim=32, text_embed_dim=32, num_layers=2, max_text_seq_length=16, use_rotary_positional_embeddings=True
        ),
        video,
    ),
    "pixeldit": (
        "pixeldit.model.PixDiT_T2I",
        dict(
            num_groups=2,
            hidden_size=128,
            pixel_hidden_size=16,
            pixel_attn_hidden_size=128,
            pixel_num_groups=2,
            patch_depth=2,
            pixel_depth=1,
            txt_embed_dim=32,
            txt_max_length=16,
        ),
        lambda: image(3, 128),
    ),
    "hunyuan dit": (
        "hydit.models.HunYuanDiT",
        dict(input_size=16, hidden_size=128, depth=2, num_heads=2, text_states_dim=32, text_states_dim_t5=32),
        lambda: dict(
            x=rn(2, 4, 16, 16),
            context=rn(2, 77, 32),
            text_embedding_mask=torch.ones(2, 77),
            encoder_hidden_states_t5=rn(2, 256, 32),
            text_embedding_mask_t5=torch.ones(2, 256),
        ),
    ),
    "hunyuan 3d 2": (
        "hunyuan3d.model.Hunyuan3Dv2",
        dict(in_channels=16, context_in_dim=32, hidden_size=128, num_heads=2, depth=1, depth_single_blocks=1),
        lambda: dict(x=rn(2, 16, 128), context=rn(2, 8, 32)),
    ),
    "hunyuan 3d 2.1": (
        "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain",
        dict(in_channels=16, hidden_size=128, context_dim=32, depth=2, num_heads=2, num_moe_layers=1, guidance_cond_proj_dim=32),
        lambda: dict(x=rn(2, 16, 128), context=rn(2, 8, 32)),
    ),
    "ernie image": (
        "ernie.model.ErnieImageModel",
        dict(hidden_size=128, num_attention_heads=1, num_layers=2, ffn_hidden_size=64, in_channels=16, out_channels=16, text_in_dim=32),
        image,
    ),
}


def make(path, arguments):
    module, name = path.rsplit(".", 1)
    network = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)(
        device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init, **arguments
    )
    for key, tensor in sorted(network.state_dict().items()):
        if tensor.is_floating_point():
            with torch.no_grad():
                if tensor.ndim >= 2:
                    tensor.copy_(rn(*tensor.shape) / tensor[0].numel() ** 0.5)
                else:
                    tensor.copy_(rn(*tensor.shape) * 0.1 + (0.0 if key.endswith("bias") else 1.0))
    return network.eval()


def exact(q, k, v, block_mask, key_bias, scale, return_lse):
    """What a GPU's INT8 kernel would be without rounding."""
    mask = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype)
    assert block_mask is None
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]), None


def answer(network, inputs, settings=None):
    """(the network's tensors, the report of our patch or None)."""
    options = {"cond_or_uncond": [0, 1], "uuids": [1, 2], "sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}
    report = None
    latent = inputs.get("x", inputs.get("hidden_states"))
    if settings is not None:
        host = _AttentionHost(settings, None)
        host.patch.start(lambda percent: 1 - percent, [1.0, 0.5, 0.0])
        first = latent[0] if isinstance(latent, list) else latent
        call = ModelCall(spans_of(network, tuple(first.shape), inputs), 0.5)
        host.patch.begin(call)
        options |= {KEY: call, OVERRIDE: host.overrides[None]}
        report = host.patch.report
    batch = (latent[0] if isinstance(latent, list) else latent).shape[0]
    names = ("timestep", "timesteps", "t")
    code = type(network).forward.__code__
    time = next(name for name in names if name in code.co_varnames[: code.co_argcount])
    out = network(**{time: torch.full((batch,), 0.5)}, **inputs, transformer_options=options)
    out = out if isinstance(out, (list, tuple)) else [out]
    return [part for part in out if torch.is_tensor(part)], report


def run(path, arguments, call):
    network, inputs = make(path, arguments), call()
    stock, _ = answer(network, inputs)
    result = {"finite": all(bool(part.isfinite().all()) for part in stock)}

    def error(outs):
        return max(float((out - part).norm() / part.norm()) for out, part in zip(outs, stock, strict=True))

    settings = dict(method="sparge", min_tokens=0, start_percent=0.0, block=16)
    outs, report = answer(network, inputs, AttentionSettings(density=1.0, precision="auto", **settings))
    result["quantized"] = {"error": error(outs), **{key: report.as_dict()[key] for key in ("calls", "reasons")}}
    outs, report = answer(network, inputs, AttentionSettings(density=0.5, precision="native", **settings))
    result["sparse"] = {"error": error(outs), **{key: report.as_dict()[key] for key in ("calls", "reasons")}}
    return result


kernel.explain(dispatch.Problem(torch.device("cpu"), torch.float32, 1, 1, 1, 1, 16))  # fills the registry
no_blocks = [lambda problem: "dense only" if problem.blocks is not None else None]
dispatch._implementations.insert(0, dispatch.Implementation("exact", "int8", tuple(no_blocks), lambda: exact))
selftest.ensure = lambda *_: True

with torch.inference_mode():
    for name in NAMES or NETWORKS:
        try:
            result = run(*NETWORKS[name])
        except Exception:
            result = {"failure": traceback.format_exc()[-1500:]}
        print("RESULT " + json.dumps({"network": name, **result}), flush=True)
