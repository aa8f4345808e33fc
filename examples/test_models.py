"""Models of diffusers, tiny, as cases: by `parallelise` their output and every parameter's gradient equal one device's.

$ pytest examples              # three of them, and the faults
$ python .ci/paste.py          # all of them
$ python .ci/paste.py flux     # those of one name: a new model needs a case here, and then this
"""

from unittest import mock

import diffusers
import torch
import torch.distributed as dist

from examples.diffusers_any import parallelise
from test_sp import draws

VIDEO, TEXT, AUDIO = 45, 7, 11  # tokens; 5 frames of 3 x 3: nothing divides by 2, and 45 alone by 3
CASES = {}


def case(model, config, variants=("",)):
    """Register inputs(draw, variant) -> {argument: value} as the case of a model and each of its variants."""

    def register(inputs):
        for variant in variants:
            name = f"{inputs.__name__} {variant}".strip()
            more = config.get(variant, {})
            CASES[name] = model, config["all"] | more, inputs, variant

    return lambda inputs: register(inputs) or inputs


def build(name, seed=0):
    """Return (model, inputs) of a case. No parameter is zero: zero gates would hide every block."""
    kind, config, inputs, variant = CASES[name]
    model = getattr(diffusers, kind)(**config).double()
    draw = draws(seed)
    for param in model.parameters():
        param.data = draw(param.shape) * (0.5 if param.dim() < 2 else 0.2)
    return model, inputs(draw, variant)


def ragged(batch=2, length=TEXT):
    """A mask of which the last sample's end is padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - 3 :] = 0
    return mask


def ids(*sizes):
    return torch.cartesian_prod(*[torch.arange(float(size)) for size in sizes])


WAN = dict(num_attention_heads=5, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=6, freq_dim=8, ffn_dim=16, num_layers=2)  # fmt: skip
I2V = dict(image_dim=5, added_kv_proj_dim=60, in_channels=9)


@case("WanTransformer3DModel", {"all": WAN, "2.1 i2v": I2V, "2.2 i2v": dict(in_channels=9)}, ["2.1 t2v", "2.1 i2v", "2.2 i2v", "2.2 ti2v"])  # fmt: skip
def wan(draw, variant):
    """2.2's ti2v has a timestep for each token."""
    channels, text = 9 if variant.endswith(" i2v") else 4, 512 if variant == "2.1 i2v" else TEXT
    image = dict(encoder_hidden_states_image=draw(2, 9, 5)) if variant == "2.1 i2v" else {}
    timestep = (
        torch.linspace(1, 900, 2 * VIDEO).view(2, VIDEO) if variant == "2.2 ti2v" else torch.tensor([900.5, 3.25])
    )
    return (
        dict(hidden_states=draw(2, channels, 5, 6, 6), timestep=timestep, encoder_hidden_states=draw(2, text, 6))
        | image
    )


@case("ChronoEditTransformer3DModel", {"all": WAN | I2V})
def chronoedit(draw, variant):
    image = dict(encoder_hidden_states_image=draw(2, 9, 5))
    times = torch.tensor([900.5, 3.25])
    return dict(hidden_states=draw(2, 9, 5, 6, 6), timestep=times, encoder_hidden_states=draw(2, 512, 6)) | image


LTX = dict(in_channels=4, out_channels=4, num_attention_heads=5, attention_head_dim=8, cross_attention_dim=40, num_layers=2, caption_channels=6)  # fmt: skip


@case("LTXVideoTransformer3DModel", {"all": LTX}, ["", "masked"])
def ltx(draw, variant):
    mask = ragged() if variant else None
    sizes = dict(num_frames=5, height=3, width=3, encoder_attention_mask=mask)
    return (
        dict(
            hidden_states=draw(2, VIDEO, 4),
            encoder_hidden_states=draw(2, TEXT, 6),
            timestep=torch.tensor([900.5, 3.25]),
        )
        | sizes
    )


AUDIO_OF_LTX2 = dict(audio_in_channels=3, audio_out_channels=3, audio_num_attention_heads=5, audio_attention_head_dim=4, audio_cross_attention_dim=20)  # fmt: skip
LTX23 = dict(gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True, use_prompt_embeddings=False, perturbed_attn=True, rope_type="split")  # fmt: skip


@case(
    "LTX2VideoTransformer3DModel",
    {"all": LTX | AUDIO_OF_LTX2, "2.3": LTX23, "keyframes": dict(use_keyframes_abs_pos_embedding=True)},
    ["", "masked", "i2v", "2.3", "keyframes", "reference"],
)
def ltx2(draw, variant):
    """With audio. i2v: a timestep for each token. reference: a mask over pairs of video tokens."""
    widths = (40, 20) if variant == "2.3" else (6, 6)
    streams = dict(hidden_states=draw(2, VIDEO, 4), audio_hidden_states=draw(2, AUDIO, 3))
    streams |= dict(
        encoder_hidden_states=draw(2, TEXT, widths[0]), audio_encoder_hidden_states=draw(2, TEXT, widths[1])
    )
    sizes = dict(num_frames=5, height=3, width=3, audio_num_frames=AUDIO)
    times = dict(timestep=torch.tensor([[900.5], [3.25]]))
    if variant == "i2v":
        times = dict(
            timestep=torch.linspace(1, 900, 2 * VIDEO).view(2, VIDEO), audio_timestep=torch.tensor([[700.0], [3.0]])
        )
    if variant == "2.3":
        times |= dict(sigma=torch.tensor([900.5, 3.25]), use_cross_timestep=True, audio_timestep=times["timestep"] + 20)
        times |= dict(audio_sigma=torch.tensor([920.5, 23.25]))
    if variant in ("masked", "i2v"):
        times |= dict(encoder_attention_mask=ragged(), audio_encoder_attention_mask=ragged())
    if variant == "keyframes":
        times |= dict(video_keyframes_mask=(torch.arange(VIDEO) < 9).expand(2, -1)[..., None].double())
    if variant == "reference":
        times |= dict(
            video_self_attention_mask=torch.rand(2, VIDEO, VIDEO, generator=torch.Generator().manual_seed(3)).double()
        )
    return streams | sizes | times


QWEN = dict(in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=5, joint_attention_dim=6, axes_dims_rope=(2, 2, 4))  # fmt: skip


@case(
    "QwenImageTransformer2DModel",
    {"all": QWEN | dict(patch_size=1), "edit": dict(zero_cond_t=True)},
    ["", "masked", "edit", "control"],
)
def qwen(draw, variant):
    """edit: a reference of 20 tokens behind the image's 25, modulated at time 0. control: residuals of a ControlNet."""
    shapes = [[(1, 5, 5), (1, 4, 5)] if variant == "edit" else [(1, 5, 9)]] * 2
    more = dict(encoder_hidden_states_mask=ragged()) if variant in ("masked", "edit") else {}
    more |= dict(controlnet_block_samples=[draw(2, VIDEO, 40)]) if variant == "control" else {}
    streams = dict(hidden_states=draw(2, VIDEO, 4), encoder_hidden_states=draw(2, TEXT, 6))
    return streams | dict(timestep=torch.tensor([0.9, 0.1]), img_shapes=shapes) | more


FLUX = dict(in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=5, joint_attention_dim=6, guidance_embeds=True)  # fmt: skip


@case(
    "FluxTransformer2DModel", {"all": FLUX | dict(pooled_projection_dim=6, axes_dims_rope=(2, 2, 4))}, ["", "kontext"]
)
def flux(draw, variant):
    """kontext: a reference's tokens behind the image's, at index 1."""
    image = torch.cat((ids(1, 5, 5), ids(1, 4, 5) + torch.tensor([1.0, 0, 0]))) if variant else ids(1, 5, 9)
    streams = dict(
        hidden_states=draw(2, VIDEO, 4), encoder_hidden_states=draw(2, TEXT, 6), pooled_projections=draw(2, 6)
    )
    times = dict(timestep=torch.tensor([0.9, 0.1]), guidance=torch.tensor([3.5, 3.5]))
    return streams | times | dict(img_ids=image, txt_ids=torch.zeros(TEXT, 3))


@case("Flux2Transformer2DModel", {"all": FLUX | dict(timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2))})
def flux2(draw, variant):
    streams = dict(hidden_states=draw(2, VIDEO, 4), encoder_hidden_states=draw(2, TEXT, 6))
    times = dict(timestep=torch.tensor([0.9, 0.1]), guidance=torch.tensor([3.5, 3.5]))
    places = dict(img_ids=ids(1, 5, 9, 1).expand(2, -1, -1), txt_ids=ids(1, 1, 1, TEXT).expand(2, -1, -1))
    return streams | times | places


MINIMAX = dict(num_attention_heads=5, attention_head_dim=8, hidden_size=24, num_layers=2, num_refiner_layers=1, ffn_dim=16, in_channels=4, audio_in_channels=3, text_dim=6, freq_dim=8, time_embed_hidden_dim=12, time_embed_dim=10, rope_freq_dim=1)  # fmt: skip


@case("MiniMaxH3Transformer3DModel", {"all": MINIMAX})
def minimax_h3(draw, variant):
    """With audio: 63 tokens in one sequence; the first frame is given, so its timestep is another."""
    order = torch.randperm(VIDEO + TEXT + AUDIO, generator=torch.Generator().manual_seed(5))
    video, text, audio = (part.sort().values for part in order.split((VIDEO, TEXT, AUDIO)))
    tags = torch.zeros(len(order), dtype=torch.long)
    tags[text], tags[audio] = 1, 2
    times = torch.zeros(len(order), dtype=torch.long)
    times[video[:9]] = 1
    streams = dict(
        hidden_states=draw(2, VIDEO, 16), audio_hidden_states=draw(2, AUDIO, 3), encoder_hidden_states=draw(2, TEXT, 6)
    )
    rows = dict(timestep=torch.tensor([0.9, 0.0]), timestep_indices=times, token_tags=tags)
    places = dict(position_ids=ids(len(order), 1, 1), video_indices=video, audio_indices=audio, text_indices=text)
    return streams | rows | places


HUNYUAN = dict(in_channels=4, out_channels=4, num_attention_heads=5, attention_head_dim=8, num_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=6, rope_axes_dim=(2, 2, 4))  # fmt: skip
SINGLE = dict(num_single_layers=2, pooled_projection_dim=6)
KINDS = {kind: dict(image_condition_type=kind) for kind in ("latent_concat", "token_replace")}
KINDS["latent_concat"] |= dict(in_channels=9)


@case("HunyuanVideoTransformer3DModel", {"all": HUNYUAN | SINGLE} | KINDS, ["", *KINDS])
def hunyuan_video(draw, variant):
    channels = 9 if variant == "latent_concat" else 4
    streams = dict(
        hidden_states=draw(2, channels, 5, 6, 6),
        encoder_hidden_states=draw(2, TEXT, 6),
        encoder_attention_mask=ragged(),
    )
    times = dict(timestep=torch.tensor([900.5, 3.25]), guidance=torch.tensor([6016.0, 1000.0]))
    return streams | times | dict(pooled_projections=draw(2, 6))


HISTORY = dict(has_image_proj=True, image_proj_dim=5, has_clean_x_embedder=True)


@case("HunyuanVideoFramepackTransformer3DModel", {"all": HUNYUAN | SINGLE | HISTORY}, ["", "one sample"])
def framepack(draw, variant):
    batch = 1 if variant else 2  # one sample's text is trimmed by the model, and no mask is built
    frames = dict(hidden_states=5, latents_clean=2, latents_history_2x=2, latents_history_4x=4)
    streams = {name: draw(batch, 4, count, 6, 6) for name, count in frames.items()}
    starts = dict(indices_latents=(8, 5), indices_latents_clean=(6, 2), indices_latents_history_2x=(4, 2), indices_latents_history_4x=(0, 4))  # fmt: skip
    places = {name: torch.arange(start, start + count) for name, (start, count) in starts.items()}
    text = dict(
        encoder_hidden_states=draw(batch, TEXT, 6), encoder_attention_mask=ragged(batch), image_embeds=draw(batch, 3, 5)
    )
    times = dict(timestep=torch.tensor([900.5, 3.25])[:batch], guidance=torch.tensor([6016.0, 1000.0])[:batch])
    return streams | places | text | times | dict(pooled_projections=draw(batch, 6))


FIFTEEN = dict(num_layers=2, text_embed_2_dim=5, image_embed_dim=4, target_size=64)


@case("HunyuanVideo15Transformer3DModel", {"all": HUNYUAN | FIFTEEN}, ["t2v", "i2v"])
def hunyuan_video15(draw, variant):
    """The model puts the padding of its three texts last; without an image all of the image's tokens are padding."""
    streams = dict(hidden_states=draw(2, 4, 5, 3, 3), timestep=torch.tensor([900.5, 3.25]).double())
    text = dict(encoder_hidden_states=draw(2, TEXT, 6), encoder_attention_mask=ragged())
    glyphs = dict(encoder_hidden_states_2=draw(2, 4, 5), encoder_attention_mask_2=ragged(2, 4))
    image = draw(2, 3, 4) if variant == "i2v" else torch.zeros(2, 3, 4).double()
    return streams | text | glyphs | dict(image_embeds=image)


# --------------------------------------------------------------------------------------------------------------------
# against one device


def all_in_float64():
    """Models norm and rotate in float32 whatever they compute in, which would round at 1e-7."""
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


def run(model, inputs, ranks=1, precision=all_in_float64):
    """Return (outputs, {name: gradient}) of a loss of all outputs, the same on each of the ranks, divided by their number."""
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
