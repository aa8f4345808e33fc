"""Translate names of weights and config fields between the original release, diffusers and ComfyUI."""

import re

import torch

from full.files import read_json
from hunyuan_sp import HunyuanConfig

# Each line is a layer: its name in the original, in diffusers (a + where its rows are split over several layers), and in
# ComfyUI if that differs. The line above a group gives the prefixes of the three names; * is the block's number
# fmt: off
NAMES = [
    (("", "", ""), [
        ("img_in.proj", "x_embedder.proj", ""),
        ("time_in.mlp.0", "time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        ("time_in.mlp.2", "time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        ("guidance_in.mlp.0", "time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
        ("guidance_in.mlp.2", "time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1", ""),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2", ""),
        ("final_layer.adaLN_modulation.1", "norm_out.linear", ""),
        ("final_layer.linear", "proj_out", ""),
    ]),
    (("txt_in.", "context_embedder.", "txt_in."), [
        ("input_embedder", "proj_in", ""),
        ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1", "t_embedder.in_layer"),
        ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2", "t_embedder.out_layer"),
        ("c_embedder.linear_1", "time_text_embed.text_embedder.linear_1", "c_embedder.in_layer"),
        ("c_embedder.linear_2", "time_text_embed.text_embedder.linear_2", "c_embedder.out_layer"),
    ]),
    ((
        "txt_in.individual_token_refiner.blocks.*.",
        "context_embedder.token_refiner.refiner_blocks.*.",
        "txt_in.individual_token_refiner.blocks.*.",
    ), [
        ("norm1", "norm1", ""),
        ("norm2", "norm2", ""),
        ("self_attn_qkv", "attn.to_q+attn.to_k+attn.to_v", "self_attn.qkv"),
        ("self_attn_proj", "attn.to_out.0", "self_attn.proj"),
        ("mlp.fc1", "ff.net.0.proj", "mlp.0"),
        ("mlp.fc2", "ff.net.2", "mlp.2"),
        ("adaLN_modulation.1", "norm_out.linear", ""),
    ]),
    (("double_blocks.*.", "transformer_blocks.*.", "double_blocks.*."), [
        ("img_mod.linear", "norm1.linear", "img_mod.lin"),
        ("txt_mod.linear", "norm1_context.linear", "txt_mod.lin"),
        ("img_attn_qkv", "attn.to_q+attn.to_k+attn.to_v", "img_attn.qkv"),
        ("txt_attn_qkv", "attn.add_q_proj+attn.add_k_proj+attn.add_v_proj", "txt_attn.qkv"),
        ("img_attn_q_norm", "attn.norm_q", "img_attn.norm.query_norm"),
        ("img_attn_k_norm", "attn.norm_k", "img_attn.norm.key_norm"),
        ("txt_attn_q_norm", "attn.norm_added_q", "txt_attn.norm.query_norm"),
        ("txt_attn_k_norm", "attn.norm_added_k", "txt_attn.norm.key_norm"),
        ("img_attn_proj", "attn.to_out.0", "img_attn.proj"),
        ("txt_attn_proj", "attn.to_add_out", "txt_attn.proj"),
        ("img_mlp.fc1", "ff.net.0.proj", "img_mlp.0"),
        ("img_mlp.fc2", "ff.net.2", "img_mlp.2"),
        ("txt_mlp.fc1", "ff_context.net.0.proj", "txt_mlp.0"),
        ("txt_mlp.fc2", "ff_context.net.2", "txt_mlp.2"),
    ]),
    (("single_blocks.*.", "single_transformer_blocks.*.", "single_blocks.*."), [
        ("modulation.linear", "norm.linear", "modulation.lin"),
        ("linear1", "attn.to_q+attn.to_k+attn.to_v+proj_mlp", ""),
        ("linear2", "proj_out", ""),
        ("q_norm", "attn.norm_q", "norm.query_norm"),
        ("k_norm", "attn.norm_k", "norm.key_norm"),
    ]),
]
# fmt: on
TABLE = {
    original + name: ([diffusers + n for n in theirs.split("+")], [comfyui + (other or name)])
    for (original, diffusers, comfyui), layers in NAMES
    for name, theirs, other in layers
}
NAMINGS = ("original", "diffusers", "comfyui")
PREFIXES = "model.diffusion_model. model.model. diffusion_model. transformer. module. model. _orig_mod.".split()


def names_in(naming, name):
    """Return the names that the rows of our parameter `name` have in another release."""
    if naming not in NAMINGS:
        raise ValueError(f"no naming {naming!r}: there are {', '.join(NAMINGS)}")
    if naming == "original":
        return [name]
    module, _, kind = name.rpartition(".")
    number = re.search(r"blocks\.(\d+)\.", module)
    pattern = re.sub(r"blocks\.\d+\.", "blocks.*.", module)
    return [f"{n.replace('*', number[1] if number else '*')}.{kind}" for n in TABLE[pattern][naming == "comfyui"]]


def naming_of(names):
    """Return "original", "diffusers" or "comfyui", recognised by names that only one of them has."""
    if any(n.startswith(("x_embedder.", "single_transformer_blocks.", "transformer_blocks.")) for n in names):
        return "diffusers"
    return "comfyui" if any(re.search(r"_attn\.qkv|_mod\.lin\.|^time_in\.in_layer", n) for n in names) else "original"


def swap_halves(naming, name, tensor):
    """Swap the halves of the final layer's modulation: (scale, shift) in diffusers, (shift, scale) in the release."""
    swap = naming == "diffusers" and name.startswith("final_layer.adaLN_modulation")
    return torch.cat(tensor.chunk(2)[::-1]) if swap else tensor


def export_weight(config, name, tensor, naming):
    """Return one parameter of ours as {name: tensor} in another naming."""
    names = names_in(naming, name)
    return dict(zip(names, swap_halves(naming, name, tensor).split(row_sizes(config, names, len(tensor)))))


def row_sizes(config, names, rows):
    """Return how many rows each name has in another release: the hidden size each, and the rest for the last."""
    return [config.hidden_size] * (len(names) - 1) + [rows - config.hidden_size * (len(names) - 1)]


def unprefixed(tensors):
    """Strip the prefixes that trainers put before all names. ValueError if two names become one."""
    names = {name: name for name in tensors}
    for prefix in (p for p in PREFIXES for _ in range(2)):
        if tensors and all(name.startswith(prefix) for name in names.values()):
            names = {key: name.removeprefix(prefix) for key, name in names.items()}
    names = {key: re.sub(r"(query|key)_norm\.scale$", r"\1_norm.weight", name) for key, name in names.items()}
    keys = {}
    for key, name in names.items():
        if name in keys:
            raise ValueError(f"{keys[name]} and {key} are the same weight, {name}")
        keys[name] = key
    return {name: tensors[key] for name, key in keys.items()}


# --------------------------------------------------------------------------------------------------------------------
# configs

# our field -> its name in the config.json of diffusers' HunyuanVideoTransformer3DModel
DIFFUSERS_FIELDS = dict(
    num_heads="num_attention_heads",
    rope_dims="rope_axes_dim",
    rope_theta="rope_theta",
    double_depth="num_layers",
    single_depth="num_single_layers",
    refiner_depth="num_refiner_layers",
    mlp_ratio="mlp_ratio",
    in_channels="in_channels",
    out_channels="out_channels",
    text_dim="text_embed_dim",
    pooled_dim="pooled_projection_dim",
    guidance_embed="guidance_embeds",
    image_condition_type="image_condition_type",
)


def diffusers_config(config):
    """Return a HunyuanConfig as the contents of diffusers' config.json."""
    time, side, _ = config.patch_size
    theirs = {name: getattr(config, ours) for ours, name in DIFFUSERS_FIELDS.items()}
    theirs |= dict(rope_axes_dim=list(config.rope_dims), attention_head_dim=config.head_dim, qk_norm="rms_norm")
    return dict(_class_name="HunyuanVideoTransformer3DModel") | theirs | dict(patch_size=side, patch_size_t=time)


def config_from_diffusers(file):
    """Read a config.json of diffusers as a HunyuanConfig. ValueError if it is of another model than HunyuanVideo."""
    try:
        theirs = dict(image_condition_type=None) | read_json(file)
        ours = {name: theirs[key] for name, key in DIFFUSERS_FIELDS.items()}
        for name in (
            "double_depth",
            "single_depth",
            "refiner_depth",
            "num_heads",
            "in_channels",
            "text_dim",
            "pooled_dim",
        ):
            if type(ours[name]) is not int or not 0 <= ours[name] <= 65536 // (64 if "depth" in name else 1):
                raise ValueError(f"{DIFFUSERS_FIELDS[name]} is {ours[name]!r}")
        if not 0 < float(ours["mlp_ratio"]) <= 64:
            raise ValueError(f"mlp_ratio is {ours['mlp_ratio']!r}")
        config = HunyuanConfig.from_dict(ours | dict(patch_size=[theirs["patch_size_t"], *[theirs["patch_size"]] * 2]))
        wrong = {key: value for key, value in diffusers_config(config).items() if theirs.get(key) != value}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the config of a HunyuanVideoTransformer3DModel ({error!r})") from None
    kind = config.image_condition_type
    channels = {
        None: [config.in_channels],
        "token_replace": [config.out_channels],
        "latent_concat": [2 * config.out_channels + 1],
    }
    if config.in_channels not in channels.get(kind, []):
        raise ValueError(
            f"{file} has image_condition_type {kind} and {config.in_channels} channels: it is neither kind that is known"
        )
    if wrong:
        found = ", ".join(f"{key} is {theirs.get(key)}, not {value}" for key, value in wrong.items())
        raise ValueError(f"{file} is of another model: {found}")
    return config
