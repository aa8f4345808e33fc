"""Models of diffusers, tiny, as cases: by `parallelise` their output and every parameter's gradient equal one device's.

    $ pytest examples              # three of them, and the faults
    $ python .ci/paste.py          # all of them
    $ python .ci/paste.py flux     # those of one name

A new model needs a case here: a config and inputs as its pipeline makes them, both functions of the sizes `s`.
"""

from types import SimpleNamespace
from unittest import mock

import diffusers
import torch
import torch.distributed as dist

from examples.diffusers_any import parallelise
from test_sp import draws

# latents of T x h x w patches; images of one and of two parts; nothing divides by 2, and the 45 video tokens alone by 3
UNEVEN = SimpleNamespace(heads=5, T=5, h=3, w=3, video=45, text=7, audio=11, image=(5, 9), parts=((5, 5), (4, 5)))
EVEN = SimpleNamespace(heads=6, T=5, h=3, w=4, video=60, text=6, audio=12, image=(6, 10), parts=((6, 6), (4, 6)))
CASES = {}


def case(model, config, variants):
    """Register inputs(draw, variant, s) -> {argument: value} as a case of the model for each variant.

    config(s): a dict; variants: {name: what its config has more}.
    """

    def register(inputs):
        for variant, more in variants.items():
            CASES[f"{inputs.__name__} {variant}".strip()] = model, config, more, inputs, variant
        return inputs

    return register


def build(name, s=UNEVEN, seed=0):
    """Return (model, inputs) of a case. No parameter is zero: zero gates would hide every block."""
    kind, config, more, inputs, variant = CASES[name]
    model = getattr(diffusers, kind)(**config(s) | more).double()
    draw = draws(seed)
    for param in model.parameters():
        param.data = draw(param.shape) * (0.5 if param.dim() < 2 else 0.2)
    return model, inputs(draw, variant, s)


def ragged(length, batch=2):
    """A mask of which the last sample's end is padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - 3 :] = 0
    return mask


def ids(*sizes):
    return torch.cartesian_prod(*[torch.arange(float(size)) for size in sizes])


TIMES = torch.tensor([900.5, 3.25])


def of_each_token(s):
    return torch.linspace(1, 900, 2 * s.video).view(2, s.video)


# --------------------------------------------------------------------------------------------------------------------
# Wan and its kin


def wan_config(s):
    channels = dict(in_channels=4, out_channels=4, text_dim=6, freq_dim=8, ffn_dim=16)
    return channels | dict(num_attention_heads=s.heads, attention_head_dim=12, num_layers=2)


def with_image(s):
    return wan_config(s) | dict(image_dim=5, added_kv_proj_dim=12 * s.heads, in_channels=9)


def wan_inputs(draw, s, channels=4, text=None):
    latents = draw(2, channels, s.T, 2 * s.h, 2 * s.w)
    return dict(hidden_states=latents, timestep=TIMES, encoder_hidden_states=draw(2, text or s.text, 6))


@case("WanTransformer3DModel", wan_config, {"2.1 t2v": {}, "2.2 i2v": dict(in_channels=9), "2.2 ti2v": {}})
def wan(draw, variant, s):
    """2.2's ti2v has a timestep for each token."""
    inputs = wan_inputs(draw, s, 9 if variant == "2.2 i2v" else 4)
    return inputs | (dict(timestep=of_each_token(s)) if variant == "2.2 ti2v" else {})


@case("WanTransformer3DModel", with_image, {"2.1": {}})
def wan_i2v(draw, variant, s):
    """Its text has 512 tokens, or the model takes part of it for the image's."""
    return wan_inputs(draw, s, 9, 512) | dict(encoder_hidden_states_image=draw(2, 9, 5))


@case("ChronoEditTransformer3DModel", with_image, {"": {}})
def chronoedit(draw, variant, s):
    return wan_i2v(draw, variant, s)


@case("WanVACETransformer3DModel", wan_config, {"": dict(vace_layers=[0, 1], vace_in_channels=5)})
def wan_vace(draw, variant, s):
    control = dict(
        control_hidden_states=draw(2, 5, s.T, 2 * s.h, 2 * s.w), control_hidden_states_scale=torch.tensor([1.0, 0.5])
    )
    return wan_inputs(draw, s) | {name: x.double() for name, x in control.items()}


@case("SkyReelsV2Transformer3DModel", wan_config, {"": {}, "forcing": dict(num_frame_per_block=5)})
def skyreels_v2(draw, variant, s):
    """forcing: a timestep for each frame, and a mask over pairs of frames."""
    forcing = dict(timestep=torch.linspace(1, 900, 2 * s.T).view(2, s.T), enable_diffusion_forcing=True)
    return wan_inputs(draw, s) | (forcing if variant else {})


def helios_config(s):
    return wan_config(s) | dict(rope_dim=(4, 4, 4))


@case("HeliosTransformer3DModel", helios_config, {"": {}, "history": {}})
def helios(draw, variant, s):
    inputs = wan_inputs(draw, s) | dict(indices_hidden_states=torch.arange(20, 20 + s.T).expand(2, -1))
    for name, (start, count) in dict(short=(17, 3), mid=(15, 2), long=(11, 4)).items() if variant else ():
        inputs[f"latents_history_{name}"] = draw(2, 4, count, 2 * s.h, 2 * s.w)
        inputs[f"indices_latents_history_{name}"] = torch.arange(start, start + count).expand(2, -1)
    return inputs


# --------------------------------------------------------------------------------------------------------------------
# LTX


def ltx_config(s):
    channels = dict(in_channels=4, out_channels=4, caption_channels=6)
    return channels | dict(
        num_attention_heads=s.heads, attention_head_dim=8, cross_attention_dim=8 * s.heads, num_layers=2
    )


def ltx2_config(s):
    audio = dict(
        in_channels=3,
        out_channels=3,
        num_attention_heads=s.heads,
        attention_head_dim=4,
        cross_attention_dim=4 * s.heads,
    )
    return ltx_config(s) | {f"audio_{name}": value for name, value in audio.items()}


@case("LTXVideoTransformer3DModel", ltx_config, {"": {}, "masked": {}})
def ltx(draw, variant, s):
    sizes = dict(num_frames=s.T, height=s.h, width=s.w, encoder_attention_mask=ragged(s.text) if variant else None)
    return dict(hidden_states=draw(2, s.video, 4), encoder_hidden_states=draw(2, s.text, 6), timestep=TIMES) | sizes


GATED = dict(gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True)
LTX23 = GATED | dict(use_prompt_embeddings=False, perturbed_attn=True, rope_type="split")
KEYFRAMES = dict(use_keyframes_abs_pos_embedding=True)


@case(
    "LTX2VideoTransformer3DModel",
    ltx2_config,
    {"": {}, "masked": {}, "i2v": {}, "2.3": LTX23, "keyframes": KEYFRAMES, "reference": {}},
)
def ltx2(draw, variant, s):
    """With audio. i2v: a timestep for each token. reference: a mask over pairs of video tokens."""
    widths = (8 * s.heads, 4 * s.heads) if variant == "2.3" else (6, 6)
    inputs = dict(hidden_states=draw(2, s.video, 4), audio_hidden_states=draw(2, s.audio, 3))
    inputs |= dict(
        encoder_hidden_states=draw(2, s.text, widths[0]), audio_encoder_hidden_states=draw(2, s.text, widths[1])
    )
    inputs |= dict(num_frames=s.T, height=s.h, width=s.w, audio_num_frames=s.audio, timestep=TIMES[:, None])
    if variant == "i2v":
        inputs |= dict(timestep=of_each_token(s), audio_timestep=TIMES[:, None])
    if variant == "2.3":
        inputs |= dict(sigma=TIMES, audio_sigma=TIMES + 20, audio_timestep=TIMES[:, None] + 20, use_cross_timestep=True)
    if variant in ("masked", "i2v"):
        inputs |= dict(encoder_attention_mask=ragged(s.text), audio_encoder_attention_mask=ragged(s.text))
    if variant == "keyframes":
        inputs |= dict(video_keyframes_mask=(torch.arange(s.video) < s.h * s.w).expand(2, -1)[..., None].double())
    if variant == "reference":
        inputs |= dict(video_self_attention_mask=draw(2, s.video, s.video).sigmoid())
    return inputs


# --------------------------------------------------------------------------------------------------------------------
# images: a reference's tokens follow the image's


def image_config(s):
    heads = dict(num_attention_heads=s.heads, attention_head_dim=8, joint_attention_dim=6)
    return heads | dict(in_channels=4, axes_dims_rope=(2, 2, 4))


def qwen_config(s):
    return image_config(s) | dict(out_channels=4, num_layers=2, patch_size=1)


def flux_config(s):
    return image_config(s) | dict(num_layers=1, num_single_layers=2, guidance_embeds=True, pooled_projection_dim=6)


def flux2_config(s):
    layers = dict(num_layers=1, num_single_layers=2, guidance_embeds=True, timestep_guidance_channels=8)
    return image_config(s) | layers | dict(axes_dims_rope=(2, 2, 2, 2))


def image_inputs(draw, s):
    return dict(hidden_states=draw(2, s.video, 4), encoder_hidden_states=draw(2, s.text, 6), timestep=TIMES / 1000)


def places(s, parts):
    """(part, row, column) of each token."""
    return torch.cat([ids(1, *size) + torch.tensor([float(n), 0, 0]) for n, size in enumerate(parts)])


LAYERED = dict(use_layer3d_rope=True, use_additional_t_cond=True)


@case(
    "QwenImageTransformer2DModel",
    qwen_config,
    {"": {}, "masked": {}, "edit": dict(zero_cond_t=True), "layered": LAYERED, "control": {}},
)
def qwen(draw, variant, s):
    """edit: the reference is modulated at time 0. control: residuals of a ControlNet."""
    parts = s.parts if variant in ("edit", "layered") else [s.image]
    inputs = image_inputs(draw, s) | dict(img_shapes=[[(1, *size) for size in parts]] * 2)
    if variant in ("masked", "edit", "layered"):
        inputs |= dict(encoder_hidden_states_mask=ragged(s.text))
    if variant == "layered":
        inputs |= dict(additional_t_cond=torch.tensor([0, 1]))
    if variant == "control":
        inputs |= dict(controlnet_block_samples=[draw(2, s.video, 8 * s.heads)])
    return inputs


@case("FluxTransformer2DModel", flux_config, {"": {}, "kontext": {}, "control": {}})
def flux(draw, variant, s):
    inputs = image_inputs(draw, s) | dict(guidance=torch.full((2,), 3.5), pooled_projections=draw(2, 6))
    if variant == "control":
        inputs |= {f"controlnet_{kind}_samples": [draw(2, s.video, 8 * s.heads)] for kind in ("block", "single_block")}
    return inputs | dict(
        img_ids=places(s, s.parts if variant == "kontext" else [s.image]), txt_ids=torch.zeros(s.text, 3)
    )


@case("Flux2Transformer2DModel", flux2_config, {"": {}, "edit": {}})
def flux2(draw, variant, s):
    image = places(s, s.parts if variant == "edit" else [s.image])
    image = torch.cat((image, torch.zeros(len(image), 1)), 1)
    text = ids(1, 1, 1, s.text)
    both = dict(img_ids=image.expand(2, -1, -1), txt_ids=text.expand(2, -1, -1))
    return image_inputs(draw, s) | both | dict(guidance=torch.full((2,), 3.5))


# --------------------------------------------------------------------------------------------------------------------
# MiniMax-H3: one sequence of all


def minimax_config(s):
    width = dict(hidden_size=24, ffn_dim=16, freq_dim=8, time_embed_hidden_dim=12, time_embed_dim=10, rope_freq_dim=1)
    heads = dict(num_attention_heads=s.heads, attention_head_dim=8, num_layers=2, num_refiner_layers=1)
    return width | heads | dict(in_channels=4, audio_in_channels=3, text_dim=6)


@case("MiniMaxH3Transformer3DModel", minimax_config, {"": {}})
def minimax_h3(draw, variant, s):
    """With audio; the first frame is given, so its timestep is another."""
    order = torch.randperm(s.video + s.text + s.audio, generator=torch.Generator().manual_seed(5))
    video, text, audio = (part.sort().values for part in order.split((s.video, s.text, s.audio)))
    tags, times = torch.zeros_like(order), torch.zeros_like(order)
    tags[text], tags[audio], times[video[: s.h * s.w]] = 1, 2, 1
    inputs = dict(hidden_states=draw(2, s.video, 16), audio_hidden_states=draw(2, s.audio, 3))
    inputs |= dict(encoder_hidden_states=draw(2, s.text, 6), position_ids=ids(len(order), 1, 1))
    inputs |= dict(timestep=torch.tensor([0.9, 0.0]), timestep_indices=times, token_tags=tags)
    return inputs | dict(video_indices=video, audio_indices=audio, text_indices=text)


# --------------------------------------------------------------------------------------------------------------------
# HunyuanVideo


def hunyuan_config(s):
    channels = dict(in_channels=4, out_channels=4, text_embed_dim=6, rope_axes_dim=(2, 2, 4), mlp_ratio=2.0)
    return channels | dict(num_attention_heads=s.heads, attention_head_dim=8, num_layers=1, num_refiner_layers=1)


def hunyuan1_config(s):
    return hunyuan_config(s) | dict(num_single_layers=2, pooled_projection_dim=6)


def framepack_config(s):
    return hunyuan1_config(s) | dict(has_image_proj=True, image_proj_dim=5, has_clean_x_embedder=True)


def hunyuan15_config(s):
    return hunyuan_config(s) | dict(num_layers=2, text_embed_2_dim=5, image_embed_dim=4, target_size=64)


def hunyuan_inputs(draw, s, batch=2):
    inputs = dict(encoder_hidden_states=draw(batch, s.text, 6), encoder_attention_mask=ragged(s.text, batch))
    inputs |= dict(timestep=TIMES[:batch], guidance=torch.tensor([6016.0, 1000.0])[:batch])
    return inputs | dict(pooled_projections=draw(batch, 6))


LATENT_CONCAT = dict(image_condition_type="latent_concat", in_channels=9)
TOKEN_REPLACE = dict(image_condition_type="token_replace")


@case(
    "HunyuanVideoTransformer3DModel",
    hunyuan1_config,
    {"": {}, "latent_concat": LATENT_CONCAT, "token_replace": TOKEN_REPLACE},
)
def hunyuan_video(draw, variant, s):
    channels = 9 if variant == "latent_concat" else 4
    return hunyuan_inputs(draw, s) | dict(hidden_states=draw(2, channels, s.T, 2 * s.h, 2 * s.w))


@case("HunyuanVideoFramepackTransformer3DModel", framepack_config, {"": {}, "one sample": {}})
def framepack(draw, variant, s):
    """The text of one sample is trimmed by the model, which builds no mask then."""
    batch = 1 if variant else 2
    frames = dict(hidden_states=s.T, latents_clean=2, latents_history_2x=2, latents_history_4x=4)
    inputs = {name: draw(batch, 4, count, 2 * s.h, 2 * s.w) for name, count in frames.items()}
    starts = dict(latents=8, latents_clean=6, latents_history_2x=4, latents_history_4x=0)
    for (name, start), count in zip(starts.items(), frames.values()):
        inputs[f"indices_{name}"] = torch.arange(start, start + count)
    return inputs | hunyuan_inputs(draw, s, batch) | dict(image_embeds=draw(batch, 3, 5))


@case("HunyuanVideo15Transformer3DModel", hunyuan15_config, {"t2v": {}, "i2v": {}})
def hunyuan_video15(draw, variant, s):
    """The model puts the padding of its three texts last; without an image all of the image's tokens are padding."""
    inputs = dict(hidden_states=draw(2, 4, s.T, s.h, s.w), timestep=TIMES.double())
    inputs |= dict(encoder_hidden_states=draw(2, s.text, 6), encoder_attention_mask=ragged(s.text))
    inputs |= dict(encoder_hidden_states_2=draw(2, 4, 5), encoder_attention_mask_2=ragged(4))
    return inputs | dict(image_embeds=draw(2, 3, 4) * (variant == "i2v"))


# --------------------------------------------------------------------------------------------------------------------
# against one device


def all_in_float64():
    """Models norm and rotate in float32 whatever they compute in, which would round at 1e-7."""
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


def run(model, inputs, ranks=1, precision=all_in_float64):
    """Return (outputs, {name: gradient}) of a loss of all outputs, divided by the number of ranks that have the same."""
    model.zero_grad()
    with precision():
        outs = model(**inputs, return_dict=False)
        loss = sum((out * draws(7)(out.shape)).sum() for out in outs) / ranks
        loss.backward()
    assert all(out.abs().max() > 1e-3 for out in outs)
    return [out.detach() for out in outs], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def errors(ours, truth):
    """Return the largest error of each tensor, relative to its own size."""
    return {name: ((ours[name] - x).abs().max() / (x.abs().max() + 1e-3)).item() for name, x in truth.items()}


def compare(name, group, plan=None, change=lambda model, inputs: None, paste=parallelise):
    """Return the (worst output, worst gradient) of a case on the ranks of `group` against one device."""
    model, inputs = build(name)
    change(model, inputs)
    outs, grads = run(model, inputs)
    paste(model, group, *([plan] if plan else []))
    our_outs, our_grads = run(model, inputs, dist.get_world_size(group))
    for grad in our_grads.values():
        dist.all_reduce(grad, group=group)
    assert grads.keys() == our_grads.keys() and len(grads) > 20, "a parameter has no gradient"
    return max(errors(dict(enumerate(our_outs)), dict(enumerate(outs))).values()), max(
        errors(our_grads, grads).values()
    )
