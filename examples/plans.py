"""Where to split models of diffusers 0.42: plans for those that have none, or one that lacks something.

A plan is a dict in diffusers' own form, path -> rule; `*` in a path is every block of a list. Here it is a function of
the model, since some depend on its config.

    {argument: ContextParallelInput}     the argument of that module is split before its forward
    {index: ContextParallelInput}        the output of that index is split behind it
    ContextParallelOutput                its output is gathered (a list: one rule or None for each output)

Two more are ours, for what is no stream of tokens of its own:

    {argument: rule(x, group, lengths)}  the argument becomes what the function returns: this rank's part of it
    rule(mask)                           at an attention module: the mask over this rank's keys, made of the one it builds

lengths: {(path, argument or index): tokens over all ranks} of what this forward has split so far.
"""

import inspect
import re
from functools import partial

import torch

from comm import gather_sequence, group_rank, group_size, split_sequence, split_sizes

try:  # the private names of diffusers, here alone: if one has moved, import it from its new place
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    BACKENDS = _AttentionBackendRegistry._backends  # {name: function of query, key, value [B, L, H, D]}
except (ImportError, AttributeError) as gone:
    import diffusers

    moved = f"diffusers {diffusers.__version__} has moved what examples/plans.py imports, known to 0.42: {gone}"
    raise ImportError(moved) from None
CONFIG = "_parallel_config"  # of a processor, which hands it to the backend as an argument of that name
OWN_PLAN = "_cp_plan"  # of a model's class

tokens = ContextParallelInput(split_dim=1)
rope = {n: ContextParallelInput(split_dim=0, split_output=True) for n in (0, 1)}  # cos and sin, [N, D]
rope_of_wan = {n: ContextParallelInput(split_dim=1, split_output=True) for n in (0, 1)}  # [1, N, 1, D]
rope_of_batch = {n: ContextParallelInput(split_dim=-2, split_output=True) for n in (0, 1)}  # [B, N, D] or [B, H, N, D]
gather = ContextParallelOutput(gather_dim=1)


def plan_of(model):
    """Return the plan of a model of diffusers: the one of this file, else its own. ValueError without either."""
    for kind in type(model).__mro__:
        if kind.__name__ in PLANS:
            return PLANS[kind.__name__](model)
    if getattr(model, OWN_PLAN, None) is None:
        known = ", ".join(sorted(PLANS))
        raise ValueError(
            f"{type(model).__name__} has no plan of its own ({OWN_PLAN}), and plans.py has none for it ({known})"
        )
    return getattr(model, OWN_PLAN)


def hunyuan_video(model):
    """HunyuanVideo 1.0: its mask is over video and text, which are split one by one; num_tokens are the first frame's."""
    beside = dict(attention_mask=video_and_text_mask)
    beside |= dict(num_tokens=first_tokens) if model.config.image_condition_type == "token_replace" else {}
    return {
        "rope": rope,
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "transformer_blocks.*": beside,
        "single_transformer_blocks.*": beside,
        "proj_out": gather,
    }


def framepack(model):
    """FramePack: only the last frames' tokens leave the blocks, so all are gathered first; its rope is joined of several."""
    table = ContextParallelInput(split_dim=0)
    return {
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "transformer_blocks.*": dict(attention_mask=video_and_text_mask, freqs_cis=table),
        "single_transformer_blocks.*": dict(attention_mask=video_and_text_mask, image_rotary_emb=table),
        f"single_transformer_blocks.{len(model.single_transformer_blocks) - 1}": [gather, None],
    }


VIDEO = ("transformer_blocks.0", "hidden_states")


def video_and_text_mask(mask, group, lengths):
    """Split a mask [B, 1, 1, video + text] as its tokens are."""
    parts = mask.split((lengths[VIDEO], mask.shape[-1] - lengths[VIDEO]), -1)
    return torch.cat([split_sequence(part, group, -1) for part in parts], -1)


def first_tokens(count, group, lengths):
    """Return how many of the video's first `count` tokens this rank has."""
    sizes, rank = split_sizes(lengths[VIDEO], group), group_rank(group)
    return min(max(count - sum(sizes[:rank]), 0), sizes[rank])


def hunyuan_video15(model):
    return {
        "rope": rope,
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "transformer_blocks.*": {"attention_mask": tokens},
        "transformer_blocks.*.attn": keys_of,
        "proj_out": gather,
    }


def keys_of(mask):
    """[B, 1, N, N] -> [B, 1, 1, N]: padding may neither ask nor answer there; nobody reads what it asks."""
    return mask.diagonal(dim1=2, dim2=3)[:, :, None]


def ltx2(model):
    """LTX-2: its own plan lacks the audio, and the ropes of its kinds. Timesteps may be one a sample or one a token."""
    names = "hidden_states encoder_hidden_states audio_hidden_states audio_encoder_hidden_states video_keyframes_mask"
    masks = dict.fromkeys(
        ("encoder_attention_mask", "audio_encoder_attention_mask"), ContextParallelInput(1, expected_dims=2)
    )
    ropes = ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")
    return {
        "": dict.fromkeys(names.split(), tokens) | masks | dict.fromkeys(("timestep", "audio_timestep"), per_token),
        **dict.fromkeys(ropes, rope_of_batch),
        "transformer_blocks.*.attn1": unpadded,
        "proj_out": gather,
        "audio_proj_out": gather,
    }


def per_token(timestep, group, lengths):
    return split_sequence(timestep, group) if timestep.dim() > 1 and timestep.shape[1] > 1 else timestep


def unpadded(mask):
    """[B, H, N, N + n] -> [B, H, N, N]: a whole mask of the video is padded by as many keys as this rank has."""
    return mask[..., : mask.shape[2]]


def wan_vace(model):
    """Wan VACE: its control's blocks stand beside the others, and each of them is given the whole video."""
    return {
        "rope": rope_of_wan,
        "blocks.0": {"hidden_states": tokens},
        "vace_blocks.*": {"hidden_states": tokens},
        "vace_blocks.0": {"control_hidden_states": tokens},
        "proj_out": gather,
    }


def skyreels_v2(model):
    """SkyReels-V2: with diffusion forcing, what follows the blocks has a time for each token: all are gathered first."""
    return {
        "rope": rope_of_wan,
        "blocks.0": {"hidden_states": tokens},
        "blocks.*": {"temb": ContextParallelInput(split_dim=2, expected_dims=4)},
        f"blocks.{len(model.blocks) - 1}": gather,
    }


def helios(model):
    """Helios: its own plan, which splits around each layer, for any depth."""
    if model.config.is_amplify_history:
        raise ValueError(
            "HeliosTransformer3DModel with is_amplify_history: its attention finds the history by whole lengths"
        )
    own = {path: rules for path, rules in getattr(model, OWN_PLAN).items() if "*" in path}
    return own | {path.replace("*", str(n)): gather for path in own for n in range(len(model.blocks))}


def with_residuals(model):
    """Qwen-Image, FLUX.1: their own plans lack what a ControlNet adds to the tokens of each block."""
    plan = getattr(model, OWN_PLAN)
    names = [name for name in inspect.signature(type(model).forward).parameters if name.endswith("block_samples")]
    return plan | {"": plan.get("", {}) | dict.fromkeys(names, tokens)}


PLANS = {
    "FluxTransformer2DModel": with_residuals,
    "QwenImageTransformer2DModel": with_residuals,
    "HeliosTransformer3DModel": helios,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "HunyuanVideoFramepackTransformer3DModel": framepack,
    "HunyuanVideo15Transformer3DModel": hunyuan_video15,
    "LTX2VideoTransformer3DModel": ltx2,
    "SkyReelsV2Transformer3DModel": skyreels_v2,
    "WanVACETransformer3DModel": wan_vace,
}


# --------------------------------------------------------------------------------------------------------------------
# hooks: a plan at work. sp: the group, and the lengths so far


def add_hooks(model, plan, split_at):
    """Split and gather in this model as the plan says. split_at(path): a place's state. ValueError for unknown names."""
    modules = dict(model.named_modules())
    for path, rules in plan.items():
        pattern = re.escape(path).replace(r"\*", "[^.]+")
        places = [place for place in modules if re.fullmatch(pattern, place)]
        if not places:
            raise ValueError(f"{type(model).__name__} has no module {path!r}, which the plan names")
        for place in places:
            module, sp = modules[place], split_at(place)
            if callable(rules):
                getattr(module.processor, CONFIG).mask_rule = rules
            elif isinstance(rules, dict):
                names = arguments_of(module, rules, place)
                before = partial(split_inputs, rules=rules, names=names, path=path, sp=sp)
                module.register_forward_pre_hook(before, with_kwargs=True)
                module.register_forward_hook(partial(split_outputs, rules=rules, path=path, sp=sp))
            else:
                module.register_forward_hook(partial(gather_outputs, rules=rules, sp=sp))


def arguments_of(module, rules, place):
    """Return the names of a module's arguments. ValueError if the plan has a rule for another."""
    signature = inspect.signature(type(module).forward).parameters
    names = list(signature)[1:]
    unknown = {name for name in rules if isinstance(name, str)} - {*names}
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
        raise ValueError(f"{place or 'the model'} ({type(module).__name__}) takes no {', '.join(sorted(unknown))}")
    return names


@torch.compiler.disable
def split_inputs(module, args, kwargs, rules, names, path, sp):
    args, kwargs = list(args), dict(kwargs)
    for name, rule in rules.items():
        if name in kwargs:
            kwargs[name] = split(kwargs[name], rule, (path, name), sp)
        elif name in names[: len(args)]:
            place = names.index(name)
            args[place] = split(args[place], rule, (path, name), sp)
    return tuple(args), kwargs


@torch.compiler.disable
def split_outputs(module, args, out, rules, path, sp):
    outs = (out,) if torch.is_tensor(out) else out
    outs = tuple(split(x, rules[n], (path, n), sp) if n in rules else x for n, x in enumerate(outs))
    return outs[0] if torch.is_tensor(out) else outs


def split(x, rule, where, sp):
    """Return this rank's part of a tensor or of each of a list; of what has other dimensions than expected, all."""
    if callable(rule):
        return x if x is None else rule(x, sp.group, sp.lengths)
    if isinstance(x, list | tuple):
        rules = rule if isinstance(rule, list | tuple) else [rule] * len(x)
        return type(x)(split(part, rules[n], (*where, n), sp) for n, part in enumerate(x))
    if not torch.is_tensor(x) or rule.expected_dims not in (None, x.dim()):
        return x
    length = x.shape[rule.split_dim]
    if length < group_size(sp.group):  # the model's own code need not work on no tokens
        raise ValueError(f"{sp.path}: {where[1]} has {length} tokens, fewer than the {group_size(sp.group)} ranks")
    sp.lengths[where] = length
    return split_sequence(x, sp.group, rule.split_dim)


@torch.compiler.disable
def gather_outputs(module, args, out, rules, sp):
    outs, rules = ((out,), (rules,)) if torch.is_tensor(out) else (out, rules)
    outs = tuple(
        x if rule is None else gather_stream(x, rule.gather_dim, sp) for x, rule in zip(outs, rules, strict=True)
    )
    return outs[0] if torch.is_tensor(out) else outs


def gather_stream(x, dim, sp):
    return gather_sequence(x, sp.group, sp.once((x.shape[dim],), partial(length_of, sp)), dim)


def length_of(sp, sizes):
    """Return the length of the stream of which each rank holds its part. ValueError if it is none, or several joined."""
    streams = sp.streams(sizes)
    if len(streams) != 1:
        held = f"{sp.path}: the ranks hold {sizes} tokens to gather"
        raise ValueError(f"{held}, which is no stream that the plan splits ({sorted(set(sp.lengths.values()))})")
    return streams[0]
