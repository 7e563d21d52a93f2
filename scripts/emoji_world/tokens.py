"""The world's tokenizer: byte-level BPE in CLIPTokenizer's form (vocab.json, merges.txt), learned from its
captions."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from emoji_world.scenes import COLOURS, NAMES, captions

MAX_LENGTH = 32
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")  # of DDPO's prompt set
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def corpus() -> list[str]:
    texts = [c for name in NAMES for colour in COLOURS for c in captions(name, colour)]
    texts += [f"{n} {name}s and a {name} {act}" for n in NUMBERS for name in NAMES for act in ACTIVITIES]
    return texts


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learns the merges and writes the tokenizer; the end-of-text token has the highest id, as in CLIP."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(alphabet)
    vocab = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer
