"""A BertModel with a WordPiece vocabulary, small and random, in the files of a sentence encoder."""

import json
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

from safetensors.torch import save_file
from seeded import filled


def small_teacher_folder(folder: Path, words: int = 6000) -> Path:
    """Its vocabulary: the pieces of a "kick" and "##ing", letters, and so many whole words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    letters = [*ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase), ",", "-"]
    made = map("".join, islice(product(ascii_lowercase, repeat=3), words))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, "kick", "##ing", *made]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    tokenizer.decoder = decoders.WordPiece()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "vocab_size": len(tokens)}
    config = BertConfig(**sizes)
    entries = {**sizes, "model_type": "bert", "layer_norm_eps": config.layer_norm_eps}
    (folder / "config.json").write_text(json.dumps(entries))
    bert = filled(BertModel(config, add_pooling_layer=False))
    save_file(bert.state_dict(), folder / "model.safetensors")
    return folder
