"""Published reward weights as folders that reward.NAME.path takes.

    python scripts/published_reward.py aesthetic sac+logos+ava1-l14-linearMSE.pth rewards/laion
    python scripts/published_reward.py preference yuvalkirstain/PickScore_v1 rewards/pickscore

aesthetic: the head of LAION's predictor (a state dict), on OpenAI's ViT-L/14, which open_clip fetches from the hub or finds in
--clip FOLDER. preference: a CLIP in transformers' format (a folder or a hub id) that was tuned on choices, as PickScore is; it is
written in open_clip's format, with its own logit scale.
"""

import argparse
import json
import sys
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from alignlab.rewards.heads import Agreement  # noqa: E402

VIT_L14 = "hf-hub:timm/vit_large_patch14_clip_224.openai"
BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
"""transformers' names in a block -> open_clip's."""


def tower(state: dict[str, Tensor], theirs: str, ours: str, layers: int) -> dict[str, Tensor]:
    """The blocks of one tower; open_clip stacks the projections of queries, keys and values."""
    out = {}
    for n in range(layers):
        block, home = f"{theirs}.encoder.layers.{n}", f"{ours}transformer.resblocks.{n}"
        for kind in ("weight", "bias"):
            out |= {f"{home}.{name}.{kind}": state[f"{block}.{old}.{kind}"] for old, name in BLOCK.items()}
            out[f"{home}.attn.in_proj_{kind}"] = torch.cat([state[f"{block}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
    return out


def in_open_clip(model: CLIPModel) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A CLIP of transformers' as open_clip's configuration and weights."""
    config, state = model.config, model.state_dict()
    image, text = config.vision_config, config.text_config
    shape = {
        "embed_dim": config.projection_dim, "quick_gelu": image.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": image.image_size, "layers": image.num_hidden_layers, "width": image.hidden_size, "patch_size": image.patch_size,
            "head_width": image.hidden_size // image.num_attention_heads, "mlp_ratio": image.intermediate_size / image.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
            "heads": text.num_attention_heads, "layers": text.num_hidden_layers, "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }  # fmt: skip
    vision, words = "vision_model", "text_model"
    weights = {
        "visual.class_embedding": state[f"{vision}.embeddings.class_embedding"],
        "visual.conv1.weight": state[f"{vision}.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state[f"{vision}.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state[f"{words}.embeddings.token_embedding.weight"],
        "positional_embedding": state[f"{words}.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
        **tower(state, vision, "visual.", image.num_hidden_layers),
        **tower(state, words, "", text.num_hidden_layers),
    }
    for old, new in {f"{vision}.pre_layrnorm": "visual.ln_pre", f"{vision}.post_layernorm": "visual.ln_post"}.items():
        weights |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    weights |= {f"ln_final.{kind}": state[f"{words}.final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    return shape, {k: v.float().contiguous() for k, v in weights.items()}


def preference(source: str, folder: Path) -> None:
    """folder/clip in open_clip's format, and the identity before the cosine."""
    model = CLIPModel.from_pretrained(source)
    shape, weights = in_open_clip(model)
    (folder / "clip").mkdir(parents=True, exist_ok=True)
    look = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": look}, indent=2))
    save_file(weights, folder / "clip" / "open_clip_model.safetensors")
    head = Agreement(model.config.projection_dim)
    head.logit_scale.data = weights["logit_scale"]
    write(folder, "preference", str(folder.resolve() / "clip"), head.state_dict())


def aesthetic(source: str, folder: Path, clip: str) -> None:
    """The head as it is: its five layers have no activation between them."""
    state = torch.load(source, map_location="cpu", weights_only=True)
    write(folder, "aesthetic", clip, {k: v.float().contiguous() for k, v in state.items()})


def write(folder: Path, kind: str, clip: str, head: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in head.items()}, folder / "head.safetensors")
    (folder / "reward.json").write_text(json.dumps({"kind": kind, "clip": clip, "relu": False}, indent=2) + "\n")
    print(f"reward={kind} reward.{kind}.path={folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("aesthetic", "preference"))
    parser.add_argument("source", help="LAION's .pth file; a CLIP in transformers' format")
    parser.add_argument("folder", type=Path, help="written")
    parser.add_argument("--clip", default=VIT_L14, help="what an aesthetic head stands on, as open_clip finds it (%(default)s)")
    args = parser.parse_args()
    if args.kind == "aesthetic":
        aesthetic(args.source, args.folder, args.clip)
    else:
        preference(args.source, args.folder)


if __name__ == "__main__":
    main()
