"""Build a model to sample from or to export: released weights or a checkpoint of training, with LoRA files on top."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from full import faults
from full.checkpoints import Checkpoints
from full.fa4 import attention_kernel
from full.files import fingerprint
from full.flags import compute_dtype, get_config
from full.lora import lora_facts, lora_files, merge_checkpoint, merge_loras
from full.memory import check_host, pinned
from full.screen import say
from full.slices import slice_mlps
from full.weights import load_weights, weight_files
from hunyuan_sp import HunyuanConfig, HunyuanVideo, init_weights


def resolve(args):
    """Fill in flags that follow from others, and return the config, or None if the checkpoint's manifest has it."""
    if args.checkpoint is None and not (args.model or args.weights or args.config):
        args.checkpoint = "out"
    if args.model:
        args.weights = args.weights or str(Path(args.model) / "transformer")
    if args.weights and not (args.model or args.config or args.checkpoint):
        args.config = "13b"
    if args.blocks and not (args.model or args.config):
        raise ValueError("--blocks goes with --config")
    return get_config(args) if args.model or args.config else None


class Source:
    """Find the weights: files, a checkpoint of training, or both if the checkpoint is a LoRA or goes with --model.

    config: that of --model or --config, or None. Collective. FileNotFoundError if there is no undamaged checkpoint.
    """

    def __init__(self, pm, args, config):
        self.pm, self.args, self.path, self.manifest = pm, args, None, {}
        if args.checkpoint:
            path = Path(args.checkpoint)
            one = path.name if (path / "manifest.json").is_file() else None  # OUT/step-N, not OUT
            self.checkpoints = Checkpoints(pm, path.parent if one else path, args.timeout)
            self.path, self.manifest = self.checkpoints.find(name=one)
            trained = HunyuanConfig.from_dict(self.manifest["config"])
            if config not in (None, trained):
                both = asdict(trained), asdict(config)
                wrong = ", ".join(
                    f"{name} {x}, not {both[1][name]}" for name, x in both[0].items() if x != both[1][name]
                )
                raise ValueError(f"{self.path} is of another model than --model or --config: {wrong}")
            config = trained
        self.config, self.lora = config, bool(self.manifest.get("lora"))
        own = {(folder / "lora.safetensors").resolve() for folder in (self.path, self.path.parent)} if self.lora else ()
        for file, _ in lora_files(args.lora):
            if Path(file).resolve() in own:
                raise ValueError(
                    f"--lora {file} is what --checkpoint holds, and would be added twice: give one of them"
                )
        if self.lora and not args.weights:
            raise ValueError(f"{self.path} is a LoRA: give its base model too, with --model or --weights")
        if self.path and not self.lora and "weights" in args.given:
            raise ValueError(f"{self.path} holds all weights: leave out --weights")

    def facts(self):
        """Return fingerprints of everything that the weights are made of."""
        files = weight_files(self.args.weights) if self.args.weights else []
        facts = [fingerprint([file]) for file in files]
        facts += lora_facts(file for file, _ in lora_files(self.args.lora))
        if self.path:
            facts.append(self.manifest["files"] or fingerprint(sorted(self.path.glob("*.safetensors"))))
        return facts

    def other_base(self):
        """Return a list with a sentence if the checkpoint's LoRA was trained on other weights than these, else an empty
        list."""
        base = self.manifest["lora"][2]
        same = not base or fingerprint(weight_files(self.args.weights), like=base) == base
        return [] if same else [f"{self.path} was trained on other weights than {self.args.weights}"]

    def build_model(self, shard=False, attention="sdpa", compile=False, offload=False, mlp_slices=1):
        """Return the model: plain tensors on every rank, or sharded; with `offload` sharded in the host's memory.

        Sharded weights are in the dtype of the computation, except those of a full checkpoint, which are in float32.
        """
        pm, args = self.pm, self.args
        dtype = compute_dtype(args, pm.device)
        tuned = self.path and not self.lora  # the checkpoint has all weights, in float32
        with torch.device("meta"):
            model = HunyuanVideo(self.config)
        model, on_gpu = model if tuned else model.to(dtype), pm.device.type == "cuda"
        model.attention = attention_kernel(attention)
        slice_mlps(model, mlp_slices)
        if offload and on_gpu:
            each = sum(pinned(param.numel() * param.itemsize / pm.world_size) for param in model.parameters())
            faults.together(lambda: check_host(["weights"], each, pm.world_size))
        if shard or offload:
            policy = CPUOffloadPolicy(pin_memory=on_gpu) if offload else None
            pm.shard(model, model.blocks, None if dtype == torch.float32 else dtype, offload_policy=policy)
        else:
            model = model.to_empty(device=pm.device)
        if tuned:
            params = {name: param.detach() for name, param in model.named_parameters()}
            average = params if self.manifest.get("ema") else None
            self.checkpoints.load(self.path, None if average else model, more=average)
        elif args.weights:
            load_weights(model, args.weights)
        else:
            init_weights(model, device=pm.device)
        sentences = [merge_checkpoint(model, self.path, self.manifest)] if self.lora else []
        sentences += merge_loras(model, lora_files(args.lora))
        if self.lora and pm.is_main:
            sentences += self.other_base()
        for sentence in sentences if pm.is_main else ():
            say(sentence)
        model = (model if shard or offload else model.to(dtype)).requires_grad_(False)
        if compile:
            model.compile_blocks()
        return model
