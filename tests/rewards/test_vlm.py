"""A vision-language judge: BERTScore by hand, and tiny models in the published format against transformers'
own calls."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from alignlab.planning.meta_device import Kernels, Ledger
from alignlab.rewards.bertscore import BertScore, Tokens, align
from alignlab.rewards.compose import RewardError
from alignlab.rewards.description import Description
from alignlab.rewards.questions import Questions, is_right, numbers, spellings
from alignlab.rewards.vlm import Vlm, locate

WORDS = (
    "<pad> <s> </s> <unk> <image> USER : ASSISTANT How many cats dogs are there in this image ? two three "
    "Three 3 five The contains "
    "Answer concisely what is going on a cat dog . [CLS] [SEP]"
).split()
TEMPLATE = (
    "{% for m in messages %}USER : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else "
    "%}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT :{% endif %}"
)


def words_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """Whole words."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(":", "isolated"),
            pre_tokenizers.Split("?", "isolated"),
        ]
    )
    if "cls_token" in special:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", model_max_length=64, **special
    )


def llava(folder: Path, *, template: str | None = None, chain: dict[str, str] | None = None) -> str:
    """A LLaVA of random weights: CLIP's tower on 4 patches of 16 px, a Llama, real processor files.

    Args:
        chain: instead, a model that says only what follows the last word: by 4 nats more likely than any
            other word.
    """
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    width = 64 if chain else 32
    text = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=WORDS.index("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.model.vision_tower.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if chain is not None:
        language, head = model.model.language_model, model.lm_head
        with torch.no_grad():
            for layer in language.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            language.embed_tokens.weight.copy_(torch.eye(len(WORDS), width))
            head.weight.zero_()
            for before, after in chain.items():
                head.weight[WORDS.index(after), WORDS.index(before)] = 4 / math.sqrt(
                    width
                )  # the norm makes 1 of 64 numbers 8
    model.generation_config.update(pad_token_id=0, eos_token_id=2, bos_token_id=1)
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    tokenizer = words_tokenizer(bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"])
    transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)


def bert(folder: Path) -> str:
    """A BERT of three layers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    words_tokenizer(cls_token="[CLS]", sep_token="[SEP]").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    llava(folder / "random")
    llava(folder / "chat", template=TEMPLATE)
    llava(folder / "counts", chain={":": "three", "three": "cats", "cats": "</s>"})
    bert(folder / "bert")
    return folder


def pictures(n: int = 3) -> Tensor:
    """Smooth, unlike each other."""
    coarse = torch.rand(n, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")


# -- BERTScore


def tokens(
    rows: list[list[list[float]]], counted: list[list[int]], present: list[list[int]] | None = None
) -> Tokens:
    return Tokens(
        torch.tensor(rows, dtype=torch.float32),
        torch.tensor(present or [[1] * len(row) for row in counted]).bool(),
        torch.tensor(counted).bool(),
    )


def test_matching_by_hand() -> None:
    """Reference (1, 0), (0, 2), (3, 4); candidate (5, 0), (0.6, 0.8). Cosines: 1, .6 | 0, .8 | .6, 1.
    R = (1 + .8 + 1)/3, P = (1 + 1)/2."""
    reference, candidate = (
        tokens([[[1, 0], [0, 2], [3, 4]]], [[1, 1, 1]]),
        tokens([[[5, 0], [0.6, 0.8]]], [[1, 1]]),
    )
    found = align(candidate, reference)
    recall = 2.8 / 3
    assert found.recall.item() == pytest.approx(recall)
    assert found.precision.item() == pytest.approx(1)
    assert found.f1.item() == pytest.approx(2 * recall / (1 + recall))
    back = align(reference, candidate)
    assert (back.precision.item(), back.recall.item()) == pytest.approx((recall, 1))


def test_special_tokens_are_matched_but_not_counted() -> None:
    """The reference's second token finds its equal in the candidate's special one; that one itself counts in
    no mean. Padding, equal to everything here, is never matched, even where every cosine is negative."""
    reference = tokens([[[1, 0], [0, 1], [9, 9]]], [[1, 1, 0]], [[1, 1, 0]])
    candidate = tokens([[[1, 0], [0, 1]]], [[1, 0]])
    assert (align(candidate, reference).recall.item(), align(candidate, reference).precision.item()) == (1, 1)
    away = tokens([[[-1, 0], [0, 0]]], [[1, 0]], [[1, 0]])
    assert align(away, tokens([[[1, 0]]], [[1]])).recall.item() == -1


def test_an_empty_text_scores_nothing() -> None:
    only_special = tokens([[[1, 0], [0, 1]]], [[0, 0]])
    for pair in ((only_special, tokens([[[1, 0]]], [[1]])), (tokens([[[1, 0]]], [[1]]), only_special)):
        assert [score.item() for score in align(*pair)] == [0, 0, 0]


def test_bertscore_of_texts(home: Path) -> None:
    """Equal texts score 1; numbers are those of transformers' own layer, alone or in a batch; the baseline is
    taken out linearly."""
    score = BertScore(str(home / "bert"), 2)
    same = score(["a cat", "two dogs ."], ["a cat", "two dogs ."])
    for values in same:
        torch.testing.assert_close(values, torch.ones(2))
    candidates, references = (
        ["a cat .", "dogs", ""],
        ["The image contains three cats", "The image contains a dog", "a cat"],
    )
    found = score(candidates, references)
    alone = torch.cat([score([c], [r]).recall for c, r in zip(candidates, references, strict=True)])
    torch.testing.assert_close(found.recall, alone, rtol=0, atol=1e-5)
    assert found.recall[2] == 0 and (found.recall[:2] < 0.999).all()

    model, tokenizer = transformers.AutoModel.from_pretrained(home / "bert").eval(), score.tokenizer
    with torch.no_grad():
        x, y = (
            torch.nn.functional.normalize(
                model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0],
                dim=-1,
            )
            for text in (references[0], candidates[0])
        )
    torch.testing.assert_close(found.recall[0], (x @ y.T).amax(1)[1:-1].mean(), rtol=0, atol=1e-5)
    rescaled = BertScore(str(home / "bert"), 2, baseline=0.6)(candidates, references)
    torch.testing.assert_close(rescaled.recall, (found.recall - 0.6) / 0.4)
    with pytest.raises(ValueError, match=r"layer=4: .* has the layers 0 to 3"):
        BertScore(str(home / "bert"), 4)


def test_a_robertas_first_word_is_one_within(tmp_path: Path) -> None:
    """As in the package: what follows a blank and what begins a text are the same token. An empty text has
    none still."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(["<pad>", *letters, "ca", "cat", "Ġcat"])},
            [("c", "a"), ("ca", "t"), ("Ġ", "cat")],
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", model_max_length=32
    ).save_pretrained(tmp_path)
    config = transformers.RobertaConfig(
        vocab_size=len(core.get_vocab()),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = transformers.RobertaModel(config)
    torch.nn.init.zeros_(model.embeddings.position_embeddings.weight)
    model.save_pretrained(tmp_path)
    found = BertScore(str(tmp_path), 0)._embedded(["cat cat", " cat", ""], "cpu")
    assert found.counted.sum(1).tolist() == [2, 1, 0]
    assert torch.equal(found.embeddings[0, 0], found.embeddings[0, 1])


# -- the model


@pytest.mark.parametrize("name", ["random", "chat"])
def test_replies_are_those_of_transformers(name: str, home: Path) -> None:
    """Of each image alone, through PIL, the processor and generate; questions of other lengths beside it
    change nothing."""
    vlm = Vlm(str(home / name), dtype="float32", batch_size=2)
    questions = ["How many cats are there in this image ?", "what is this ?", "How many dogs ?"]
    replies = vlm.reply(pictures(), questions, tokens=6)
    processor, model = (
        vlm.processor,
        transformers.AutoModelForImageTextToText.from_pretrained(home / name).eval(),
    )
    for image, question, reply in zip(pictures(), questions, replies, strict=True):
        if name == "chat":
            talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(talk, add_generation_prompt=True)
            assert text == f"USER : <image> {question} ASSISTANT :"
        else:
            text = f"USER: <image>\n{question} ASSISTANT:"
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        inputs = processor(images=picture, text=text, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert (
            reply == processor.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()
        )
    assert len({*vlm.reply(pictures(), questions[:1] * 3, tokens=6)}) > 1  # it looks at the image


def test_likelihoods_are_those_of_transformers(home: Path) -> None:
    """Replies of one or more tokens beside each other: the product of the tokens' probabilities, as when each
    is asked for alone."""
    vlm = Vlm(str(home / "random"), dtype="float32", batch_size=2)
    questions, replies = (
        ["How many cats ?", "How many dogs are there in this image ?", "what ?"],
        ["three", "two cats .", "three dogs"],
    )
    found = vlm.likelihood(pictures(), questions, replies)
    for k, image in enumerate(pictures()):
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        inputs = vlm.processor(
            images=picture, text=f"USER: <image>\n{questions[k]} ASSISTANT: {replies[k]}", return_tensors="pt"
        )
        ids, n = inputs.input_ids[0], len(replies[k].split())
        with torch.no_grad():
            chances = vlm.model(**inputs).logits[0].softmax(-1)
        expected = math.prod(chances[len(ids) - n - 1 + j, ids[len(ids) - n + j]].item() for j in range(n))
        assert found[k].item() == pytest.approx(expected, rel=1e-4)


def test_a_prompt_names_no_place_of_its_own(home: Path) -> None:
    """Special tokens in a question are taken out, so that a prompt neither adds an image nor ends the
    talk."""
    vlm = Vlm(str(home / "random"), dtype="float32")
    assert vlm.reply(pictures(1), ["what <image></s> is"], tokens=3) == vlm.reply(
        pictures(1), ["what is"], tokens=3
    )


# -- the rewards


def test_description(home: Path) -> None:
    """BERTScore of what the model says with "The image contains PROMPT"; the model here says "three cats" of
    every image."""
    options: dict[str, Any] = {"encoder": str(home / "bert"), "layer": 2, "dtype": "float32"}
    reward = Description(str(home / "counts"), **options)
    prompts = ["three cats", "a dog", "five dogs"]
    scores = reward(pictures(), prompts)
    expected = BertScore(str(home / "bert"), 2)(
        ["three cats"] * 3, [f"The image contains {p}" for p in prompts]
    )
    torch.testing.assert_close(scores, expected.recall)
    assert (reward.unit, reward.differentiable, scores.dtype) == ("BERTScore recall", False, torch.float32)
    torch.testing.assert_close(
        Description(str(home / "counts"), score="f1", **options)(pictures(), prompts), expected.f1
    )
    literal = Description(str(home / "counts"), reference="{}", **options)(pictures()[:1], ["three cats"])
    assert literal.item() == pytest.approx(1)


def test_counting(home: Path) -> None:
    """The model here says "three cats": right for prompts of three. The probability is the softmax of its
    logits, by hand: three 4, everything else 0, so e^4 / (e^4 + V - 1) for three, with Three and 3 beside it,
    and 1 / (e^4 + V - 1) for five."""
    prompts, path = ["three cats", "five cats", "3 dogs"], str(home / "counts")
    strict = Questions(path, dtype="float32")
    assert strict(pictures(), prompts).tolist() == [1, 0, 1]
    whole = math.exp(4) + len(WORDS) - 1
    sure = Questions(path, dtype="float32", score="probability", batch_size=2)(pictures(), prompts)
    three, five = (
        (math.exp(4) + 2) / whole,
        2 / whole,
    )  # "5" and "Five" are both <unk> to this tokenizer, which counts once
    assert sure.tolist() == pytest.approx([three, five, three], rel=1e-4)
    assert (strict.unit, sure.dtype) == ("share of right answers", torch.float32)
    with pytest.raises(RewardError, match=r"prompt 'cats' has no question: it does not match pattern="):
        strict(pictures(1), ["cats"])


def test_a_dry_run_computes_nothing(home: Path) -> None:
    """On the meta device (alignlab.plan) every reward has its shape."""
    images, prompts = torch.empty(2, 3, 16, 16, device="meta"), ["three cats", "two dogs"]
    options: dict[str, Any] = {"encoder": str(home / "bert"), "layer": 2, "dtype": "float32"}
    rewards = [
        Description(str(home / "random"), **options),
        *(Questions(str(home / "random"), score=s) for s in ("strict", "probability")),
    ]
    for reward in rewards:
        with Ledger(), Kernels("cpu"):
            scores = reward(images, prompts)
        assert scores.is_meta and scores.shape == (2,)


def test_questions_of_a_file(home: Path, tmp_path: Path) -> None:
    """DDPO's metadata: the mean over a prompt's questions, however many each prompt has."""
    lines = [
        {
            "prompt": "three cats",
            "questions": ["How many cats ?", "what is in this image ?"],
            "answers": ["three", "dog"],
        },
        {"prompt": "a cat", "questions": ["what is this ?"], "answers": ["cats"]},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reward = Questions(str(home / "counts"), file=str(tmp_path / "q.jsonl"), dtype="float32")
    assert reward(pictures(), ["three cats", "a cat", "three cats"]).tolist() == [0.5, 1, 0.5]
    with pytest.raises(RewardError, match="prompt 'two' is not in file="):
        reward(pictures(1), ["two"])


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("There are three cats.", "three", True),
        ("3", "three", True),
        ("Three", "3", True),
        ("There are 13 cats", "3", False),
        ("none of them", "one", False),
        ("sixteen", "six", False),
        ("twenty-two cats", "two", False),
        ("twenty-two cats", "twenty", False),
        ("Twenty-two cats", "twenty-two", True),
        ("two or three", "three", False),
        ("three, I count three", "three", True),
        ("many", "three", False),
        ("", "three", False),
        ("A tabby cat sits.", "cat", True),
        ("A caterpillar.", "cat", False),
        ("An Ant Bear", "ant bear", True),
        ("a c.t", "c.t", True),
        ("a cat", "c.t", False),
    ],
)
def test_what_counts_as_right(reply: str, answer: str, right: bool) -> None:
    assert is_right(reply, answer) == right


def test_numbers_and_their_spellings() -> None:
    assert numbers("Twenty, 7 and seven; 007 or 12345678901") == {20, 7}
    assert spellings("three") == ["3", "three", "Three", " 3", " three", " Three"]
    assert spellings("25") == ["25", " 25"]
    assert spellings("cat") == ["cat", "Cat", " cat", " Cat"]


@pytest.mark.parametrize(
    ("reward", "arguments", "said"),
    [
        (
            Questions,
            {"path": "/nowhere"},
            "path=/nowhere: there is no such folder; give a folder in transformers' format, or owner/name",
        ),
        (Questions, {"path": "{tmp}"}, "has no config.json"),
        (Questions, {"path": "a/b", "pattern": "(", "question": ""}, r"pattern=\( is no regular expression"),
        (Questions, {"path": "a/b", "pattern": "(.+)"}, r"has no group \(\?P<answer>...\)"),
        (
            Questions,
            {"path": "a/b", "pattern": "(?P<answer>.+)", "question": "{noun}?"},
            "names {noun}, which is no group of pattern",
        ),
        (Questions, {"path": "a/b", "file": "/nowhere.jsonl"}, "file=/nowhere.jsonl cannot be read"),
        (Questions, {"path": "a/b", "file": "{tmp}/bad.jsonl"}, "bad.jsonl, line 2: write"),
        (Description, {"path": "a/b", "encoder": "nowhere"}, "encoder=nowhere: there is no such folder"),
        (Description, {"path": "a/b", "reference": "cats"}, "reference='cats' has no place for the prompt"),
        (Description, {"path": "a/b", "baseline": 1.0}, "baseline=1.0 must be less than 1"),
    ],
)
def test_mistakes(reward: Any, arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Before anything is loaded."""
    good = {"prompt": "a", "questions": ["b"], "answers": ["c"]}
    (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | {"answers": []}))
    arguments = {
        k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in arguments.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        reward.check(**arguments)


def test_a_name_on_the_hub_is_left_to_transformers() -> None:
    assert locate("owner/name-1.5") == "owner/name-1.5"
