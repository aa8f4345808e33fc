"""LoRA files as people find them: read at the strength that was meant, or refused with the true reason."""

import json
import math
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from full.lora import (
    add_lora,
    in_folder,
    init_lora,
    layers_of,
    lora_facts,
    lora_files,
    merge_lora,
    merge_loras,
    save_lora,
)
from full.lora_files import read_lora
from hunyuan_sp import HunyuanConfig, HunyuanVideo
from test_sp import CONFIG, close, draws, random_inputs, random_model

C = CONFIG.hidden_size
LAYER, WEIGHT = "lora_unet_double_blocks_0_img_attn_proj", "double_blocks.0.img_attn_proj.weight"
A, B = draws(1, torch.float32)(4, C), draws(2, torch.float32)(C, 4)


def write(file, tensors, header=None, side=None):
    """Write a LoRA, and a JSON file beside it."""
    file.parent.mkdir(exist_ok=True, parents=True)
    save_file({name: x.clone().contiguous() for name, x in tensors.items()}, file, header)
    for name, content in (side or {}).items():
        file.with_name(name).write_text(json.dumps(content))
    return file


def plain(layer=LAYER, **more):
    """The tensors of one layer in kohya's naming."""
    return {f"{layer}.lora_down.weight": A, f"{layer}.lora_up.weight": B} | {f"{layer}.{k}": v for k, v in more.items()}


def update_of(file, strength=1.0, weight=WEIGHT, dtype=torch.float32):
    """Return what the file adds to a weight."""
    model = random_model(CONFIG, dtype=dtype)
    before = model.get_parameter(weight).detach().clone()
    merge_lora(model, file, strength)
    return (model.get_parameter(weight) - before).detach()


def peft(**values):
    return {"adapter_config.json": dict(peft_type="LORA", r=4) | values}


STRENGTHS = {  # header, side files, alpha's tensor: the factor that B A has
    "nothing is stated": (None, None, {}, 1.0),
    "a tensor": (None, None, dict(alpha=torch.tensor(8.0)), 2.0),
    "a tensor of shape [1]": (None, None, dict(alpha=torch.tensor([8.0])), 2.0),
    "peft's file beside": (None, peft(lora_alpha=16), {}, 4.0),
    "peft's file beside, rank-stabilised": (None, peft(lora_alpha=16, use_rslora=True), {}, 8.0),
    "another trainer's file beside": (None, {"lora_config.json": dict(lora_params=dict(lora_rank=4, lora_alpha=2))}, {}, 0.5),
    "diffusers' header": (dict(lora_adapter_metadata=json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})), None, {}, 2.0),
    "kohya's header": (dict(ss_network_alpha="1.0", ss_network_dim="4"), None, {}, 0.25),
    "a header in a header": (dict(config=json.dumps(dict(network=dict(linear=4, linear_alpha=8)))), None, {}, 2.0),
    "a plain header": (dict(lora_alpha="12", rank="4"), None, {}, 3.0),
    "statistics and settings of a training": (
        dict(ss_tag_frequency=json.dumps(dict(my_lora=dict(alpha=3, r=7))), ot_config=json.dumps(dict(lora_alpha=8, optimizer=dict(alpha=0.9, r=0)))), None, {}, 2.0,
    ),
    "a trainer's section": (dict(settings=json.dumps(dict(lora=dict(rank=4, alpha=2)))), None, {}, 0.5),
    "a list in a job's settings": (dict(config=json.dumps(dict(process=[dict(network=dict(linear=4, linear_alpha=16))]))), None, {}, 4.0),
    "a dotted name": ({"network.alpha": "2", "x.alpha": "9"}, None, {}, 0.5),
    "another spelling": ({"LORA-ALPHA": "8"}, None, {}, 2.0),
    "a component's name": (dict(transformer_lora_alpha="8"), None, {}, 2.0),
    "an alpha of whole numbers": (None, None, dict(alpha=torch.tensor(8)), 2.0),
    "two that agree": (dict(ss_network_alpha="8"), peft(lora_alpha=8), dict(alpha=torch.tensor(8.0)), 2.0),
}  # fmt: skip


@pytest.mark.parametrize("how", STRENGTHS)
def test_the_strength_that_was_meant(how, tmp_path):
    header, side, more, factor = STRENGTHS[how]
    file = write(tmp_path / "a.safetensors", plain(**more), header, side)
    close(update_of(file), factor * B @ A, 1e-5)
    close(update_of(file, 0.5), 0.5 * factor * B @ A, 1e-5)
    assert re.search(r"1 layers, rank 4, (alpha \d|no alpha)", read_lora(random_model(CONFIG), file).summary)


NAMES = {
    "OneTrainer": "lora_transformer_transformer_blocks_0_attn_to_out_0.lora_{down,up}.weight",
    "diffusers": "transformer.transformer_blocks.0.attn.to_out.0.lora_{A,B}.weight",
    "older diffusers": "transformer.transformer_blocks.0.attn.to_out.0.lora.{down,up}.weight",
    "a named adapter": "transformer.transformer_blocks.0.attn.to_out.0.lora_{A,B}.default.weight",
    "peft": "base_model.model.transformer_blocks.0.attn.to_out.0.lora_{A,B}.weight",
    "the release": "diffusion_model.double_blocks.0.img_attn_proj.lora_{A,B}.weight",
    "ComfyUI": "diffusion_model.double_blocks.0.img_attn.proj.lora_{A,B}.weight",
    "kohya": "lora_unet_double_blocks_0_img_attn_proj.lora_{down,up}.weight",
}


@pytest.mark.parametrize("origin", NAMES)
def test_names_of_others(origin, tmp_path):
    """In other names than kohya's, the alpha of kohya's header is what a converter has multiplied in."""
    before, parts, after = re.fullmatch(r"(.*)\{(.*)\}(.*)", NAMES[origin]).groups()
    names = [f"{before}{part}{after}" for part in parts.split(",")]
    header = None if "kohya" in origin or "One" in origin else dict(ss_network_alpha="1.0", ss_network_dim="4")
    file = write(tmp_path / "a.safetensors", dict(zip(names, (A, B))), header)
    close(update_of(file), B @ A, 1e-5)
    assert ("the alpha of 1.0 in its header multiplied in" in read_lora(random_model(CONFIG), file).summary) == bool(
        header
    )


def test_differences_of_weights_and_biases(tmp_path):
    diff, bias = draws(3, torch.float32)(C, C), draws(4, torch.float32)(C)
    file = write(tmp_path / "a.safetensors", {f"{LAYER}.diff": diff, f"{LAYER}.diff_b": bias})
    close(update_of(file, 0.5), 0.5 * diff, 1e-5)
    close(update_of(file, 0.5, WEIGHT[:-6] + "bias"), 0.5 * bias, 1e-5)


def deep(depth):
    return '{"a":' * depth + "1" + "}" * depth


REFUSED = {  # tensors, header, side files: what is said
    "no tensors": ({}, None, None, "changes nothing: it has 0 tensors"),
    "zero B": ({f"{LAYER}.lora_down.weight": A, f"{LAYER}.lora_up.weight": 0 * B}, None, None, "changes nothing"),
    "rank 0": ({f"{LAYER}.lora_down.weight": A[:0], f"{LAYER}.lora_up.weight": B[:, :0]}, None, None, r"'A': \[0, "),
    "zero A": ({f"{LAYER}.lora_down.weight": 0 * A, f"{LAYER}.lora_up.weight": B}, None, None, "changes nothing"),
    "whole numbers": ({f"{LAYER}.lora_down.weight": A.char(), f"{LAYER}.lora_up.weight": B}, None, None, "weight in int8: only floating"),
    "quantised": (plain(scale_weight=torch.ones(1)), None, None, "is quantised"),
    "alpha of many digits": (plain(), None, peft(lora_alpha=10**4000), "which is no number"),
    "another alpha than several": (
        plain(alpha=torch.tensor(8.0)) | plain("lora_unet_double_blocks_0_txt_attn_proj", alpha=torch.tensor(4.0)), dict(lora_alpha="16"), None, "two alphas: 16 .* 4, 8 in its tensors",
    ),
    "the root of no alpha": (plain(), None, peft(use_rslora=True), "does not say what alpha is"),
    "the root, and alphas": (plain(alpha=torch.tensor(8.0)), None, peft(use_rslora=True, lora_alpha=8), "divided by the rank's root"),
    "PiSSA": (plain(), None, peft(init_lora_weights="pissa_niter_4", lora_alpha=4), "which changes the base model too"),
    "another kind of peft": (plain(), None, peft(peft_type="IA3"), "peft_type is 'IA3'"),
    "alpha alone": ({f"{LAYER}.alpha": torch.tensor(4.0)}, None, None, "has {'alpha': "),
    "alpha 0": (plain(alpha=torch.tensor(0.0)), None, None, "alpha 0.0 for .* no strength"),
    "alpha NaN": (plain(alpha=torch.tensor(math.nan)), None, None, "not finite"),
    "alpha infinite in the header": (plain(), dict(lora_alpha="inf"), None, "alpha inf in its header"),
    "alpha NaN beside": (plain(), None, peft(lora_alpha=math.nan), "alpha nan in its adapter_config.json"),
    "alpha is a word": (plain(), dict(ss_network_alpha="much"), None, "'much', which is no number"),
    "two alphas": (plain(), dict(ss_network_alpha="8"), peft(lora_alpha=4), "two values of alpha: 8 in its header.* and 4 in"),
    "another alpha in its tensors": (plain(alpha=torch.tensor(8.0)), dict(ss_network_alpha="4"), None, "two alphas: 4 .* 8 in"),
    "another rank": (plain(), dict(rank="16"), None, r"says that its rank is 16, and its layers have \[4\]"),
    "two alphas in one header": (plain(), dict(ss_network_alpha="16", lora_alpha="4"), None, "two values of alpha"),
    "patterns in diffusers' header": (
        plain(), dict(lora_adapter_metadata=json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"a": 32}})), None, "header's alpha_pattern is not empty",
    ),
    "a side file that is a list": (plain(), None, {"adapter_config.json": [1]}, "holds no JSON object"),
    "an infinite rank": (plain(), dict(rank="inf"), None, "has rank inf"),
    "two that differ by the root": (plain(), dict(use_rslora="False"), peft(use_rslora=True, lora_alpha=4), "two values of root"),
    "patterns": (plain(), None, peft(lora_alpha=4, alpha_pattern={"to_q": 8}), "json's alpha_pattern is not empty"),
    "a deep header": (plain(), dict(lora_adapter_metadata=deep(100_000)), None, "can't be read as JSON"),
    "half a header": (plain(), dict(lora_adapter_metadata='{"a": '), None, "can't be read as JSON"),
    "FLUX by its header": (plain(), {"modelspec.architecture": "flux-1-dev/lora"}, None, "another model: its modelspec"),
    "Wan by its version": (plain(), dict(ss_base_model_version="wan2.1"), None, "another model: its ss_base_model_version"),
    "another base beside": (plain(), None, peft(base_model_name_or_path="black-forest-labs/FLUX.1-dev"), "its base_model_name"),
    "HunyuanVideo 1.5": (plain(), {"modelspec.architecture": "hunyuan-video-1.5/lora"}, None, "another model: its modelspec"),
    "FLUX by its file": (plain(), dict(ss_sd_model_name="flux1-dev.safetensors"), None, "another model: its ss_sd_model_name"),
    "FLUX by peft's base class": (plain(), None, peft(auto_mapping=dict(base_model_class="FluxTransformer2DModel")), "another model: its base_model_class"),
    "FLUX by its trainer": (plain(), dict(ss_network_module="networks.lora_flux"), None, "another model: its ss_network_module"),
    "CogVideoX": (plain(), None, peft(base_model_name_or_path="THUDM/CogVideoX-5b"), "another model: its base_model_name"),
    "HunyuanVideo v1.5": (plain(), {"modelspec.architecture": "hunyuan_video_v1.5"}, None, "another model: its modelspec"),
    "HunyuanImage": (plain(), None, peft(base_model_name_or_path="tencent/HunyuanImage-2.1"), "its base_model_name"),
    "DoRA": (plain(dora_scale=torch.ones(C, 1)), None, None, "is a DoRA"),
    "DoRA by its config": (plain(), None, peft(use_dora=True, lora_alpha=4), "is a DoRA"),
    "LoKr": ({f"{LAYER}.lokr_w1": A}, None, None, "is a LoKr"),
    "LoHa": ({f"{LAYER}.hada_w1_a": A}, None, None, "is a LoHa"),
    "biases": ({f"transformer.{WEIGHT[:-6]}lora_B.bias": torch.ones(C)}, None, None, "a LoRA with biases"),
    "a text encoder's": (plain("lora_te1_text_model_encoder_layers_0_mlp_fc1"), None, None, "of a text encoder"),
    "twice, in two namings": (plain() | plain("transformer.transformer_blocks.0.attn.to_out.0"), None, None, "twice"),
    "another layer": (plain("lora_unet_double_blocks_9_img_attn_proj"), None, None, "belongs to none of its layers"),
}  # fmt: skip


@pytest.mark.parametrize("header, side", [
    ({"modelspec.architecture": "hunyuan-video/lora", "ss_base_model_version": "hunyuan_video"}, None),
    (None, peft(base_model_name_or_path="/home/wang/models/HunyuanVideo")),
    (None, peft(base_model_name_or_path="/data/my snapshot")),
    (None, peft(base_model_name_or_path="/data/hunyuan/transformer")),
    (None, peft(base_model_name_or_path="Skywork/SkyReels-V1-Hunyuan-T2V", init_lora_weights="gaussian")),
    (dict(ss_sd_model_name="mp_rank_00_model_states.pt"), None),
    ({"modelspec.description": "{trigger} dances", "training": json.dumps(dict(dataset=dict(alpha=True)))}, None),
    (dict(ss_network_dim="Dynamic", ss_network_alpha="Dynamic", ss_tag_frequency="{"), None),
])  # fmt: skip
def test_files_of_this_model_are_read(header, side, tmp_path):
    close(update_of(write(tmp_path / "a.safetensors", plain(), header, side)), B @ A, 1e-5)


@pytest.mark.parametrize("what", REFUSED)
def test_refused_for_the_true_reason(what, tmp_path):
    """Nothing is changed, and the sentence names the file."""
    tensors, header, side, reason = REFUSED[what]
    file, model = write(tmp_path / "odd.safetensors", tensors, header, side), random_model(CONFIG, dtype=torch.float32)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=reason) as error:
        merge_lora(model, file)
    assert "odd.safetensors" in str(error.value) and len(str(error.value)) < 400
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_another_depth_is_another_model(tmp_path):
    """FLUX.1's blocks have this model's names and shapes: 19 of 20 and 38 of 40. A LoRA of some blocks is fine."""
    config = HunyuanConfig(2, (2, 2, 4), 256.0, 4, 4, 1, 1.0, 4, 4, (1, 2, 2), 8, 8, False)
    model, c = random_model(config, dtype=torch.float32), config.hidden_size

    def lora(double, single):
        names = [f"double_blocks.{n}.img_attn_proj" for n in double] + [
            f"single_blocks.{n}.modulation.linear" for n in single
        ]
        shapes = {name: model.get_parameter(f"{name}.weight").shape for name in names}
        tensors = {f"{name}.lora_A.weight": torch.ones(2, c) for name in names}
        return tensors | {f"{name}.lora_B.weight": torch.ones(shapes[name][0], 2) for name in names}

    with pytest.raises(ValueError, match="covers the first 3 of 4 double blocks and the first 2 of 4 single blocks"):
        merge_lora(model, write(tmp_path / "flux.safetensors", lora(range(3), range(2))))
    ours = {"modelspec.architecture": "hunyuan-video/lora"}  # which may be of its first blocks
    merge_lora(model, write(tmp_path / "ours.safetensors", lora(range(3), range(2)), ours))
    for blocks in ((range(4), range(4)), (range(4), ()), ((1, 2), (3,)), (range(3), (2, 3))):
        merge_lora(model, write(tmp_path / "part.safetensors", lora(*blocks)))


def test_several_are_summed_and_rounded_once(tmp_path):
    """+50 and -50 of one give the base, in bfloat16 too; two different ones give their sum, rounded once."""
    one = write(tmp_path / "one.safetensors", plain())
    other = write(tmp_path / "two.safetensors", {f"{LAYER}.lora_down.weight": B.T, f"{LAYER}.lora_up.weight": A.T})
    model, base = (random_model(CONFIG, dtype=torch.bfloat16) for _ in range(2))
    sentences = merge_loras(model, [(one, 50.0), (other, 1.0), (one, -50.0), (other, -1.0)])
    for (name, ours), truth in zip(model.named_parameters(), base.parameters()):
        assert torch.equal(ours, truth), name
    assert len(sentences) == 4 and "strength 50" in sentences[0] and "1 layers, rank 4" in sentences[0]
    with pytest.raises(ValueError, match="one.safetensors: at these strengths .* is not finite"):
        merge_loras(model, [(one, 1e39)])
    merge_loras(model, [(one, 0.5), (other, 0.25)])
    wanted = (base.get_parameter(WEIGHT).float() + 0.5 * B @ A + 0.25 * A.T @ B.T).bfloat16()
    assert torch.equal(model.get_parameter(WEIGHT), wanted)


def with_random_lora(dtype=torch.float32):
    model, draw = random_model(CONFIG, dtype=dtype), draws(5, torch.float32)
    add_lora(model, 4, 8.0)
    for _, layer in layers_of(model):
        layer.lora_A.data, layer.lora_B.data = draw(layer.lora_A.shape) * 0.2, draw(layer.lora_B.shape) * 0.2
    return model


def test_ours_say_what_they_are(tmp_path):
    """Plain and modelspec fields; read here and summed up, at strength 1: what is in the file has alpha = rank."""
    model = with_random_lora()
    save_lora(model, tmp_path / "ours.safetensors", base="snapshot", steps=300, size="16 x 3 x 8 x 12", shift=7.0)
    with safe_open(tmp_path / "ours.safetensors", "pt") as handle:
        header = handle.metadata()
    wanted = dict(
        rank="4", alpha="4", trained_alpha="8.0", base="snapshot", steps="300", size="16 x 3 x 8 x 12", shift="7.0"
    )
    assert wanted.items() <= header.items() and header["modelspec.architecture"] == "hunyuan-video/lora"
    assert re.match(r"\d{4}-\d\d-\d\dT", header["date"]) and header["modelspec.date"] == header["date"]
    summary = read_lora(random_model(CONFIG), tmp_path / "ours.safetensors").summary
    assert "rank 4, alpha 4" in summary and "steps 300" in summary and "base snapshot" in summary
    layer = model.double_blocks[0].img_attn_proj
    close(update_of(tmp_path / "ours.safetensors"), layer.scale * layer.lora_B @ layer.lora_A, 1e-5)


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_lora_goes_on_from_a_file(naming, tmp_path):
    """Another alpha gives the same model; another rank, or a part that is not whole, is refused."""
    source, file = with_random_lora(), tmp_path / "first.safetensors"
    save_lora(source, file, naming)
    model = random_model(CONFIG, dtype=torch.float32)
    add_lora(model, 4, 2.0)
    init_lora(model, file)
    inputs = random_inputs(CONFIG, (1, 4, 4), (2,))
    inputs = {k: x.float() if torch.is_tensor(x) else x for k, x in inputs.items()}
    close(model(**inputs), source(**inputs), 1e-4)
    other = random_model(CONFIG, dtype=torch.float32)
    add_lora(other, 3)
    with pytest.raises(ValueError, match="rank 4, not a whole layer of rank 3"):
        init_lora(other, file)
    if naming == "diffusers":  # q, k and v apart: they must share A, as one layer has one
        stored = load_file(file)
        key = next(name for name in stored if name.endswith("to_q.lora_A.weight"))
        save_file(stored | {key: stored[key] * 2}, file)
        with pytest.raises(ValueError, match="has an A of its own for parts of"):
            init_lora(model, file)


def test_a_model_that_nobody_shards(tmp_path):
    """A and B in float32 beside weights in bfloat16."""
    model = with_random_lora(torch.bfloat16)
    inputs = random_inputs(CONFIG, (1, 4, 4), (2,))
    model(**inputs).sum().backward()
    assert all(layer.lora_B.grad.dtype == torch.float32 for _, layer in layers_of(model))


def test_files_by_their_folder(tmp_path):
    """--lora takes a file, or a folder with lora.safetensors: --out, or one of its checkpoints; with a strength or without."""
    write(tmp_path / "out/step-2/lora.safetensors", plain())
    file = str(tmp_path / "out/step-2/lora.safetensors")
    assert lora_files([f"{tmp_path}/out/step-2", f"{file}:0.5", file]) == [(file, 1.0), (file, 0.5), (file, 1.0)]
    before = lora_facts([file])
    write(tmp_path / "out/step-2/lora.safetensors", plain(), side=peft(lora_alpha=16))
    assert lora_facts([file]) != before and in_folder(f"{tmp_path}/out/step-2") == file
    with pytest.raises(ValueError, match="there is no file"):
        lora_files([f"{tmp_path}/out"])


def test_the_13b_refuses_flux(tmp_path):
    """FLUX.1-dev's file says nothing of its base: its depth does."""
    with torch.device("meta"):
        model = HunyuanVideo(HunyuanConfig.preset("13b"))
    tensors = {}
    for kind, depth in (("transformer_blocks", 19), ("single_transformer_blocks", 38)):
        for n in range(depth):
            stem = f"transformer.{kind}.{n}.attn.to_q"
            tensors |= {f"{stem}.lora_A.weight": torch.ones(1, 3072), f"{stem}.lora_B.weight": torch.ones(3072, 1)}
    file = write(tmp_path / "flux.safetensors", tensors)
    with pytest.raises(ValueError, match="first 19 of 20 double blocks and the first 38 of 40 single blocks"):
        merge_lora(model, file)
    write(file, {name: x for name, x in tensors.items() if "single" not in name})
    with pytest.raises(ValueError, match="it covers the first 19 of 20 double blocks"):
        merge_lora(model, file)
