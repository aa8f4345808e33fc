"""`parallelise` on the ranks of each layout: exact, trained under dp x sp, and what would be wrong is red or refused."""

import inspect
import runpy
import sys
from contextlib import nullcontext
from unittest import mock

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from peft import LoraConfig

import examples.plans
import test_sp
from comm import split_sequence
from examples.diffusers_any import Split, parallelise
from examples.plans import BACKENDS, CONFIG, gather, plan_of, tokens
from examples.test_models import CASES, UNEVEN, all_in_float64, build, compare, errors, run, wan_config
from examples.wan import sequence_parallel
from test_sp import assert_ok, close, draws, gather_then_slice

KNOWN = "0.42"  # of diffusers, whose private names stand in plans.py
IN_THE_SUITE = ("hunyuan_video token_replace", "wan 2.2 ti2v", "ltx2 i2v")


def test_the_version_that_these_tests_know():
    assert diffusers.__version__.startswith(KNOWN), (
        "run .ci/paste.py, see what has moved, then change KNOWN and plans.py"
    )
    for name, backend in BACKENDS.items():  # to one that takes none the exchange would never be handed
        assert CONFIG in inspect.signature(backend).parameters, name


def test_a_name_that_is_gone(monkeypatch):
    # one entry: mock.patch.dict would also remove what other threads import meanwhile
    monkeypatch.setitem(sys.modules, "diffusers.models._modeling_parallel", None)
    with pytest.raises(ImportError, match="diffusers 0.* has moved what examples/plans.py imports"):
        runpy.run_path(examples.plans.__file__)


def check_exact(pm, folder, names=IN_THE_SUITE, tolerance=1e-11):
    for name in names:
        worst = compare(name, pm.sp_group)
        if pm.is_main:
            print(f"{name:32} sp {pm.sp_size}: output {worst[0]:.1e}, gradients {worst[1]:.1e}", flush=True)
        assert max(worst) < tolerance, f"{name}: {worst}"


def check_five_heads_on_four_ranks(pm, folder):
    worst = compare("hunyuan_video", pm.world_group)
    assert max(worst) < 1e-11, worst


def check_by_hand(pm, folder):
    for name in ("wan 2.1 t2v", "wan_i2v 2.1", "wan 2.2 ti2v"):
        worst = compare(name, pm.sp_group, paste=sequence_parallel)
        assert max(worst) < 1e-11, f"{name}: {worst}"


# --------------------------------------------------------------------------------------------------------------------
# trained: dp x sp, FSDP2, checkpointing, compiled blocks, LoRA


def lora_of(model):
    """Add LoRA layers whose B is not zero, which would hide every A."""
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    draw = draws(5)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = draw(param.shape) * 0.2


def check_trained(pm, folder):
    """All parameters learn here, those of the base too."""
    model, inputs = build("hunyuan_video")
    lora_of(model)
    model.requires_grad_(True)
    _, grads = run(model, inputs, precision=nullcontext)  # blocks are compiled without the other
    parallelise(model, pm.sp_group)
    model.enable_gradient_checkpointing()
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    pm.shard(model, blocks)
    for block in blocks:
        block.compile(backend="aot_eager")
    mine = {key: x[pm.dp_rank :: pm.dp_size].to(pm.device) for key, x in inputs.items()}  # this dp rank's sample
    out = model(**mine, return_dict=False)[0]
    weights = draws(7)((2, *out.shape[1:]))[pm.dp_rank :: pm.dp_size].to(pm.device)
    pm.backward(model, (out * weights).sum() / pm.sp_size)
    ours = {key: p.grad.full_tensor().cpu() for key, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == grads.keys() and any("lora_A" in key for key in ours)
    worst = max(errors(ours, grads).values())
    assert worst < 1e-11, worst


# --------------------------------------------------------------------------------------------------------------------
# masks, and the other things that attention may be given


def attention_of(group, lengths, whole, mask=None, mask_rule=None, **rules):
    """Return attention by the exchange on this rank's part of joined streams: query, key, value [B, L, H, D] whole."""
    config = Split("attn", group, dict(enumerate(lengths)))
    config.mask_rule = mask_rule or config.mask_rule
    parts = [parts_of(x, group, lengths, 1) for x in whole]
    return dispatch_attention_fn(*parts, attn_mask=mask, parallel_config=config, **rules)


def parts_of(x, group, lengths, dim):
    return torch.cat([split_sequence(part, group, dim) for part in x.split(lengths, dim)], dim)


def check_masks(pm, folder, B=2, H=5):
    parallelise(build("wan 2.1 t2v")[0], pm.sp_group)  # it wraps the backends
    draw, group = draws(1), pm.sp_group
    for lengths in ([45, 7], [45]):
        N = sum(lengths)
        whole = [draw(B, N, H, 4) for _ in range(3)]
        keys = draw(B, H, 1, N) > 0
        pairs = draw(B, H, N, N) > 0
        bias = draw(1, H, N, N)
        for mask in (keys[:, 0, 0], keys[:, :1], keys, keys[:1], draw(B, 1, 1, N)):  # over this rank's keys
            truth = parts_of(dispatch_attention_fn(*whole, attn_mask=mask), group, lengths, 1)
            close(attention_of(group, lengths, whole, parts_of(mask, group, lengths, mask.dim() - 1)), truth)
        for mask in (keys[:, 0, 0], keys, pairs, pairs[:1, :1], bias, pairs[0, 0]):  # whole: right for one stream
            truth = parts_of(dispatch_attention_fn(*whole, attn_mask=mask), group, lengths, 1)
            if len(lengths) == 1:
                close(attention_of(group, lengths, whole, mask), truth)
            else:
                with pytest.raises(ValueError, match="attn: .*its mask is not split as its tokens are"):
                    attention_of(group, lengths, whole, mask)
        with pytest.raises(ValueError, match="its mask is not split"):  # the pairs of two ranks are missing
            attention_of(group, lengths, whole, parts_of(parts_of(pairs, group, lengths, 2), group, lengths, 3))
        with pytest.raises(ValueError, match="has neither 2 nor 4 dimensions"):
            attention_of(group, lengths, whole, pairs[:, 0])
        valid = keys[:, :1] & keys[:, :1].transpose(2, 3)
        mine = parts_of(parts_of(valid, group, lengths, 2), group, lengths, 3)
        truth = parts_of(dispatch_attention_fn(*whole, attn_mask=keys[:, :1]), group, lengths, 1)
        close(attention_of(group, lengths, whole, mine, examples.plans.keys_of), truth)
    query, key, value = whole
    grouped = [draw(B, 45, 10, 4), key, value]
    truth = split_sequence(dispatch_attention_fn(*grouped, enable_gqa=True), group)
    close(attention_of(group, [45], grouped, enable_gqa=True), truth)
    close(
        attention_of(group, [45], whole, is_causal=True),
        split_sequence(dispatch_attention_fn(*whole, is_causal=True), group),
    )
    with pytest.raises(ValueError, match="causal attention needs one stream"):
        attention_of(group, [38, 7], whole, is_causal=True)


def check_whole_keys(pm, folder):
    """A stream that a plan leaves whole is exact where it only gives keys."""
    plan = dict(plan_of(build("ltx masked")[0]))
    plan[""] = {"hidden_states": tokens}
    worst = compare("ltx masked", pm.sp_group, plan)
    assert max(worst) < 1e-11, worst

    def ip_adapter(model, inputs):
        """One processor attends twice: to joined streams, and to 4 tokens of an image that are whole."""
        for block in model.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(40, 40, 4, 0.7).double())
            for layer in block.attn.processor.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.data, layer.bias.data = draws(4)((40, 40)) * 0.2, draws(5)(40)
        inputs["joint_attention_kwargs"] = dict(ip_hidden_states=[draws(3)(2, 4, 40)])

    worst = compare("flux", pm.sp_group, change=ip_adapter)
    assert max(worst) < 1e-11, worst


# --------------------------------------------------------------------------------------------------------------------
# faults: red, or refused with one sentence


def check_faults_are_red(pm, folder):
    def mask_in_the_models_order(mask, group, lengths):
        return split_sequence(mask, group, -1)

    # 44 and 8: the parts of the joined mask are as long as those of its streams, so nothing but the result can show it
    def even(model, inputs):
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            inputs[name] = F.pad(inputs[name], (0, 0) * (inputs[name].dim() - 2) + (0, 1))
        inputs["encoder_attention_mask"][1, 3:] = 0
        inputs["hidden_states"] = draws(2)(2, 4, 4, 2, 22)

    right = plan_of(build("hunyuan_video")[0])
    assert max(compare("hunyuan_video", pm.sp_group, change=even)) < 1e-11
    wrong = right | {path: dict(attention_mask=mask_in_the_models_order) for path in right if path.endswith("blocks.*")}
    output, gradients = compare("hunyuan_video", pm.sp_group, wrong, even)
    assert output > 1e-3 and gradients > 1e-3, (output, gradients)

    with mock.patch.object(examples.plans, "gather_sequence", lambda *given: gather_then_slice(*given[:3])):
        output, gradients = compare("wan 2.1 t2v", pm.sp_group)
    assert output < 1e-11 and gradients > 0.3, (output, gradients)


def check_what_is_refused(pm, folder):
    def refused(name, plan, words, change=lambda model, inputs: None):
        with pytest.raises(ValueError, match=words):
            compare(name, pm.sp_group, plan, change)

    flux, qwen = (plan_of(build(name)[0]) for name in ("flux", "qwen masked"))
    without_text = flux | {
        "": {key: rule for key, rule in flux[""].items() if key not in ("encoder_hidden_states", "txt_ids")}
    }
    refused(
        "flux",
        without_text,
        "transformer_blocks.0.attn: the ranks hold .* a stream of the queries is missing in the plan",
    )
    unmasked = qwen | {"transformer_blocks.*": {"modulate_index": tokens}}
    refused("qwen masked", unmasked, "its mask is not split as its tokens are")
    refused(
        "qwen",
        qwen | {"transformer_blocks.5": gather},
        "QwenImageTransformer2DModel has no module 'transformer_blocks.5'",
    )
    refused("qwen", qwen | {"": {"text": tokens}}, "the model .QwenImageTransformer2DModel. takes no text")
    refused("ltx", {"proj_out": gather}, "proj_out: the ranks hold .45, 45. tokens to gather, which is no stream")

    def past_the_dispatcher(model, inputs):
        class Direct(diffusers.models.transformers.transformer_wan.WanAttnProcessor):
            def __call__(self, attn, x, *rest):
                q, k, v = (
                    layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
                    for layer in (attn.to_q, attn.to_k, attn.to_v)
                )
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        model.blocks[1].attn1.processor = Direct()

    refused("wan 2.1 t2v", None, "Direct attends to the keys of one rank", past_the_dispatcher)
    split_text = plan_of(build("wan 2.1 t2v")[0]) | {"blocks.*": {"encoder_hidden_states": tokens}}
    refused("wan 2.1 t2v", split_text, "WanAttnProcessor attends to the keys of one rank")  # its attn2 has no exchange

    def reference_alone(model, inputs):
        for path in model.attn_processors:
            kind = Flux2KVParallelSelfAttnProcessor if "single" in path else Flux2KVAttnProcessor
            model.get_submodule(path.removesuffix(".processor")).set_processor(kind())
        parallelise(model, pm.sp_group)
        model(**inputs, kv_cache_mode="extract", num_ref_tokens=20)

    refused("flux2 edit", None, "Flux2KVAttnProcessor attends to the keys of one rank", reference_alone)

    def of_another_sample(model, inputs):
        inputs["encoder_hidden_states"] += pm.rank

    refused(
        "wan 2.1 t2v", None, "input encoder_hidden_states is .* in shape and mean on the first rank", of_another_sample
    )
    with pytest.raises(ValueError, match="encoder_hidden_states has 1 tokens, fewer than the 2 ranks"):
        model, inputs = build("flux")
        inputs |= dict(encoder_hidden_states=inputs["encoder_hidden_states"][:, :1], txt_ids=inputs["txt_ids"][:1])
        parallelise(model, pm.sp_group)(**inputs)
    with pytest.raises(ValueError, match="FluxTransformer2DModel is parallel already"):
        parallelise(model, pm.sp_group)


def check_several_lengths(pm, folder):
    """Gradients of two lengths at once; with checkpointing the second forward must wait for the first's backward."""
    model, inputs = build("wan 2.1 t2v")
    short = inputs | dict(hidden_states=inputs["hidden_states"][:, :, :3])
    truth = [run(model, given)[1] for given in (inputs, short)]
    parallelise(model, pm.sp_group)
    model.zero_grad()
    with all_in_float64():
        outs = [model(**given, return_dict=False)[0] for given in (inputs, short)]
        sum((out * draws(7)(out.shape)).sum() / pm.sp_size for out in outs).backward()
    ours = {name: pm.sum(p.grad, pm.sp_group).cpu() for name, p in model.named_parameters()}
    assert max(errors(ours, {name: grad + truth[1][name] for name, grad in truth[0].items()}).values()) < 1e-11
    model.enable_gradient_checkpointing()
    outs = [model(**given, return_dict=False)[0] for given in (inputs, short)]
    with pytest.raises(ValueError, match="a forward of other lengths came before this backward"):
        outs[0].sum().backward()


@pytest.mark.parametrize("kind, config, plan, words", [
    ("WanTransformer3DModel", wan_config(UNEVEN), {"blocks.9": {"hidden_states": tokens}},
        "WanTransformer3DModel has no module 'blocks.9'"),
    ("SanaTransformer2DModel", dict(num_layers=1), None, "SanaTransformer2DModel has no plan"),
    ("CogVideoXTransformer3DModel", dict(num_attention_heads=1, attention_head_dim=16, num_layers=1),
        {"proj_out": gather}, "CogVideoXTransformer3DModel has no attention whose processor"),
])  # fmt: skip
def test_refused_by_name(kind, config, plan, words):
    with pytest.raises(ValueError, match=words):
        parallelise(getattr(diffusers, kind)(**config), None, plan)


def test_one_device():
    """A group of None: the model as it was."""
    model, inputs = build("ltx2 masked")
    outs, grads = run(model, inputs)
    ours, our_grads = run(parallelise(model, None), inputs)
    assert (
        max(*errors(our_grads, grads).values(), *errors(dict(enumerate(ours)), dict(enumerate(outs))).values()) < 1e-12
    )


def test_every_model_has_a_case():
    have = {kind for kind in dir(diffusers) if getattr(getattr(diffusers, kind, None), examples.plans.OWN_PLAN, None)}
    have |= {*examples.plans.PLANS}
    assert have == {case[0] for case in CASES.values()}


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}
ONLY = dict.fromkeys(CHECKS, "1x2") | dict(
    exact="1x2 1x3", trained="2x2", five_heads_on_four_ranks="2x2", masks="1x3", by_hand="1x3"
)


@test_sp.on_layouts(CHECKS, ONLY)
def test_on(layout, check, ranks_of_layout):
    assert_ok(layout, [check], *ranks_of_layout(layout))
