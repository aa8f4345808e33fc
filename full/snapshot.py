"""Load the VAE and the text encoders of a released snapshot in the diffusers layout. Each part loads alone; no pipeline is
built.

Needs diffusers and transformers (the extra [pipeline]), imported where they are used.
"""

import importlib.util
from functools import partial
from pathlib import Path

import torch

from full.faults import on_main
from full.files import fingerprint, open_safetensors, read_json
from full.flags import scheduler_shift
from full.names import config_from_diffusers
from full.screen import say
from full.vae import encode_frames
from full.video import check_encoder
from full.weights import weight_files

PARTS = "transformer vae scheduler".split()
ENCODERS = "text_encoder text_encoder_2 tokenizer tokenizer_2".split()
BESIDE_DIT = [*PARTS[1:], *ENCODERS, "image_processor"]  # the last one, if the snapshot has it


class Snapshot:
    """A folder with the parts of a model, checked; it encodes prompts and images with them.

    encoders: whether the text encoders will be used. ValueError if a part or the extra [pipeline] is missing.
    """

    def __init__(self, folder, encoders=True):
        self.folder = Path(folder)
        missing = [name for name in ("diffusers", "transformers", "av") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"--model needs {', '.join(missing)}: pip install -e '.[pipeline]'")
        check_encoder()
        for part in PARTS + ENCODERS * encoders:
            if not (self.folder / part).is_dir():
                raise ValueError(f"{self.folder} is not a snapshot in the diffusers layout: it has no {part}/")
        for part in ("vae", *ENCODERS[:2] * encoders):
            check_depth(self.folder / part / "config.json")
        self.config = config_from_diffusers(self.folder / "transformer/config.json")
        self.kind = self.config.image_condition_type
        self.shift = scheduler_shift(self.folder)

    def check_image(self, image, frames):
        """Raise ValueError if the model needs an image and has none, or has one that it does not take."""
        if bool(image) != bool(self.kind):
            wanted = "its first frame: give --image" if self.kind else "no --image"
            raise ValueError(f"{self.folder} is a {self.kind or 'text-to-video'} model, which takes {wanted}")
        if self.kind == "latent_concat" and frames < 5:
            raise ValueError(f"--frames {frames}: a latent_concat model gives 4 frames fewer, so 5 at least")

    def facts(self):
        """Return a fingerprint of each file but the DiT's."""
        return [fingerprint([file]) for file in encoder_files(self.folder)]

    def encode(self, pm, prompts, negative_prompt="", image=None, size=None, device=None):
        """Return {prompt: (text, pooled)} and the negative prompt's (text, pooled), on every rank.

        image, size: the first frame and (width, height), for image-to-video. Rank 0 encodes each prompt once and then frees
        the encoders, so a host never holds them twice. device: where they compute, by default the ParallelManager's.
        """
        from PIL import Image

        encoders, texts = [], {}  # the encoders are on rank 0 alone
        self._on_main(lambda: encoders.append(TextEncoders(self, device or pm.device)))
        for prompt in dict.fromkeys(prompts):
            texts[prompt] = self._on_main(lambda prompt=prompt: encoders[0](prompt, image))
        black = Image.new("RGB", size) if image else None  # as diffusers does
        negative = self._on_main(lambda: encoders[0](negative_prompt, black, every=2))
        encoders.clear()
        if pm.device.type == "cuda":
            torch.cuda.empty_cache()
        return texts, negative

    def encode_image(self, pm, image, size):
        """Return the latents [1, 16, 1, h, w] of the first frame, on every rank."""
        from PIL import Image

        first = image.resize(size, Image.Resampling.LANCZOS)
        latents = self._on_main(lambda: encode_frames(self.vae(pm.device), [first]).cpu())
        if pm.device.type == "cuda":
            torch.cuda.empty_cache()
        return latents.to(pm.device)

    def _on_main(self, function):
        return on_main(lambda: of_library(self.folder, function))

    def vae(self, device):
        """Load the VAE in its released dtype, with tiles."""
        from diffusers import AutoencoderKLHunyuanVideo

        with open_safetensors(weight_files(self.folder / "vae")[0]) as handle:
            dtype = handle.get_tensor(next(iter(handle.keys()))).dtype
        rules = dict(dtype=dtype, low_cpu_mem_usage=False)  # low_cpu_mem_usage would need accelerate
        load = partial(load_whole, AutoencoderKLHunyuanVideo, self.folder / "vae", **rules)
        vae = of_library(self.folder / "vae", load).to(device).requires_grad_(False)
        vae.enable_tiling()
        return vae


def encoder_files(folder):
    """Return the files of a snapshot, sorted, without the DiT's."""
    parts = [Path(folder, part) for part in BESIDE_DIT]
    files = [file for part in parts for file in sorted(part.rglob("*"))]
    return [file for file in files if file.is_file() and file.name[0] != "."]


def check_depth(file):
    """Raise ValueError for a config with more layers than any model has: a library would build it for hours."""
    configs = [read_json(file)]
    for config in configs:  # nested configs are added
        configs += [value for value in config.values() if isinstance(value, dict)]
        for name, value in config.items():
            if "layers" in name and isinstance(value, int) and value > 1000:
                raise ValueError(f"{file} has {name} {value}")


def template_of(kind):
    """Return the prompt template of diffusers' pipeline for this kind of model."""
    import transformers

    # else importing the pipelines prints advice about packages, and loading an encoder a report of the unused layers
    transformers.logging.set_verbosity_error()
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video

    module = pipeline_hunyuan_video_image2video if kind else pipeline_hunyuan_video
    return module.DEFAULT_PROMPT_TEMPLATE["template"]


def load_whole(kind, folder, **more):
    """Load a model with its library. ValueError if weights are missing, since libraries fill them with random numbers."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, **more)
    if lost := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(f"{folder} lacks {len(lost)} weights, {lost[0]} among them")
    return model


def of_library(where, function):
    """Call a function of a library, and turn any error in it into a ValueError of one sentence."""
    try:
        return function()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{where}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


class TextEncoders:
    """Encode a prompt -> text [L, text_dim] of valid tokens, pooled [pooled_dim], as diffusers' pipelines do (0.42).

    Text is by LLaMA (LLaVA for image-to-video) without its last two layers, which are not used; pooled is by CLIP; both in
    their released dtype. 256 tokens may follow the template's head: the prompt, and the template's end, which is one token,
    or five for image-to-video, of which the last is kept.
    """

    def __init__(self, snapshot, device):
        import transformers

        transformers.logging.disable_progress_bar()
        folder, for_image = snapshot.folder, snapshot.kind is not None
        self.template, self.head = template_of(snapshot.kind), 103 if for_image else 95
        # AutoTokenizer, or the class that the release names, may split by other rules; the template's head is checked
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder / "tokenizer", trust_remote_code=False
        )
        head = len(self.tokenizer(self.template.partition("{}")[0]).input_ids)
        if head != self.head:
            problem = f"the template's head is {head} tokens, not {self.head}"
            raise ValueError(f"{folder / 'tokenizer'} is not the release's: {problem}")

        config = transformers.AutoConfig.from_pretrained(folder / "text_encoder", trust_remote_code=False)
        text_config = config.text_config if for_image else config
        text_config.num_hidden_layers -= 2
        kind = transformers.LlavaForConditionalGeneration if for_image else transformers.LlamaModel
        rules = dict(dtype="auto", attn_implementation="sdpa")  # sdpa, since a config may name code on the hub instead
        llama = load_whole(kind, folder / "text_encoder", config=config, **rules).to(device).eval()
        self.llama, self.device = llama.model if for_image else llama, device
        (self.llama.language_model if for_image else self.llama).norm = torch.nn.Identity()
        self.clip_tokenizer = transformers.CLIPTokenizer.from_pretrained(
            folder / "tokenizer_2", trust_remote_code=False
        )
        self.clip = load_whole(transformers.CLIPTextModel, folder / "text_encoder_2", **rules).to(device).eval()
        if for_image:
            self.image_token = config.image_token_index
            self.processor = transformers.CLIPImageProcessor.from_pretrained(folder / "image_processor")
            self.every = 4 if snapshot.config.image_condition_type == "token_replace" else 2

    @torch.no_grad()
    def __call__(self, prompt, image=None, every=None):
        """Return (text, pooled) of a prompt. every: 4 keeps every fourth of the image's 576 tokens; by default as in
        training."""
        ids = self.tokenizer(self.template.format(prompt)).input_ids
        end = 1 if image is None else 5
        count, most = len(ids) - self.head - end, 257 - end
        if count > most:
            say(f"{prompt[:40]!r}.. has {count} tokens: what follows the first {most} is cut off")
        ids = ids[: self.head + 256]
        if image is None:
            text = self._states(ids)[self.head :]
        else:
            if ids.count(self.image_token) > 1:
                raise ValueError(f"{prompt[:40]!r} holds <image>, the mark that stands for the picture: leave it out")
            place = ids.index(self.image_token)
            pixels = self.processor(image, return_tensors="pt").pixel_values.to(self.device, self.llama.dtype)
            ids = [*ids[:place], *[self.image_token] * 576, *ids[place + 1 :]]
            states = self._states(ids, pixel_values=pixels)
            seen = states[place : place + 576 : every or self.every]
            words = states[self.head + 575 :]
            end_mark = words[-1:] if count < most else words[:0]
            text = torch.cat((seen, words[: min(count, most)], end_mark))
        clip_ids = self.clip_tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        clip_ids = torch.tensor([clip_ids], device=self.device)
        pooled = self.clip(clip_ids).pooler_output[0]
        return text.float().cpu(), pooled.float().cpu()

    def _states(self, ids, **more):
        ids = torch.tensor([ids], device=self.device)
        return self.llama(input_ids=ids, **more).last_hidden_state[0]
